"""What are representations made of? Their geometry, and the concepts that they hold."""

from patchclamp.decompose.concepts import ConceptMatches, match_concepts
from patchclamp.decompose.das import Subspace, das, mdas
from patchclamp.decompose.dbm import dbm
from patchclamp.decompose.embedding_geometry import (
    EmbeddingPCA,
    FourierPower,
    RankCurve,
    Topography,
    embedding_pca,
    fourier_power,
    latent_topography,
    rank_needed,
)
from patchclamp.decompose.helix import Helix, fit_helix
from patchclamp.decompose.interchange import Interchanges
from patchclamp.decompose.output_svd import HeadStates, OutputDecomposition, head_states, output_svd

__all__ = [
    "ConceptMatches",
    "EmbeddingPCA",
    "FourierPower",
    "HeadStates",
    "Helix",
    "Interchanges",
    "OutputDecomposition",
    "RankCurve",
    "Subspace",
    "Topography",
    "das",
    "dbm",
    "embedding_pca",
    "fit_helix",
    "fourier_power",
    "head_states",
    "latent_topography",
    "match_concepts",
    "mdas",
    "output_svd",
    "rank_needed",
]
