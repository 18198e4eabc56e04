"""What are representations made of? Their geometry, and the concepts that they hold."""

from patchclamp.decompose.concepts import ConceptMatches, match_concepts
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

__all__ = [
    "ConceptMatches",
    "EmbeddingPCA",
    "FourierPower",
    "Helix",
    "RankCurve",
    "Topography",
    "embedding_pca",
    "fit_helix",
    "fourier_power",
    "latent_topography",
    "match_concepts",
    "rank_needed",
]
