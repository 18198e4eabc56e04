"""`Directions`: vectors in the space of a site, by site: steering vectors, probe weights, rows of a subspace.

A sibling of `Neurons`: a neuron is one coordinate of a site's tensor, a direction any combination of them. Values
are never changed in place: each method returns a new object.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from patchclamp.errors import DataError, StoreError, unknown
from patchclamp.storage import existing_file, write_file

_NAMES, _SITES = "names", "sites"


class Directions(Mapping[str, np.ndarray]):
    """Vectors in the space of sites.

    Args:
        by_site: name of a site -> `[n, size]`, or one vector `[size]`; arrays or tensors.
        names: of the directions, the same at each site ("negation", "class 3"); None: "0", "1", ...

    Raises:
        DataError: there is none, a vector is not finite, or sites have not as many.

    Example:
        >>> directions = Directions({"resid_post.1": [[1.0, 0.0], [0.0, 2.0]]}, names=["up", "down"])
        >>> directions["resid_post.1"].shape, directions.only("down").unit()["resid_post.1"].tolist()
        ((2, 2), [[0.0, 1.0]])
    """

    def __init__(self, by_site: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
        if not isinstance(by_site, Mapping) or not by_site:
            raise DataError('directions are given by site, as in {"resid_post.3": [[0.1, ...]]}')
        self._by_site = {str(site): _checked(site, values) for site, values in by_site.items()}
        counts = {len(values) for values in self._by_site.values()}
        if len(counts) > 1:
            raise DataError(f"each site has as many directions: not {sorted(counts)}")
        count = counts.pop()
        self.names = [str(number) for number in range(count)] if names is None else [str(name) for name in names]
        if len(self.names) != count or len(set(self.names)) < count:
            raise DataError(f"{count} directions have {count} different names, not {self.names}")

    @property
    def sites(self) -> list[str]:
        """The sites, in the order given."""
        return list(self._by_site)

    @property
    def count(self) -> int:
        """How many directions there are at each site."""
        return len(self.names)

    def only(self, *names: str) -> Directions:
        """The directions of these names, in this order.

        Raises:
            UnknownName: there is none of that name.
        """
        for name in names:
            if name not in self.names:
                raise unknown("direction", name, self.names)
        rows = [self.names.index(name) for name in names]
        return Directions({site: values[rows] for site, values in self._by_site.items()}, names)

    def at(self, *sites: str) -> Directions:
        """The directions of these sites only.

        Raises:
            UnknownName: there are none at that site.
        """
        for site in sites:
            if site not in self._by_site:
                raise unknown("site with directions", site, self._by_site)
        return Directions({site: self._by_site[site] for site in sites}, self.names)

    def unit(self) -> Directions:
        """The directions scaled to length 1.

        Raises:
            DataError: a direction has no length.
        """
        lengths = {site: np.linalg.norm(values, axis=1, keepdims=True) for site, values in self._by_site.items()}
        for site, each in lengths.items():
            if not (each > 0).all():
                raise DataError(f"direction {self.names[int(np.argmin(each))]!r} has length 0 at {site}")
        return Directions({site: values / lengths[site] for site, values in self._by_site.items()}, self.names)

    def __getitem__(self, site: str) -> np.ndarray:
        """Those of one site, `[n, size]` float32."""
        if site not in self._by_site:
            raise unknown("site with directions", site, self._by_site)
        return self._by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Directions)
            and self.names == other.names
            and self.sites == other.sites
            and all(np.array_equal(values, other[site]) for site, values in self._by_site.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:4]) + (", ..." if self.count > 4 else "")
        return f"Directions({self.count} at {', '.join(self.sites)}: {shown})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a `.safetensors` file.

        Raises:
            StoreError: the file cannot be written.
        """
        import json

        from safetensors.numpy import save

        # A file has its tensors in an order of its own.
        said = {_NAMES: json.dumps(self.names), _SITES: json.dumps(self.sites)}
        write_file(path, save(dict(self._by_site), metadata=said))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read what `save` wrote.

        Raises:
            StoreError: the file is missing, or no file of directions.
        """
        import json

        from safetensors import SafetensorError, safe_open

        file = existing_file(path)
        try:
            with safe_open(file, framework="numpy") as opened:
                said = opened.metadata() or {}
                names, sites = json.loads(said[_NAMES]), json.loads(said[_SITES])
                return cls({site: opened.get_tensor(site) for site in sites}, names)
        except (SafetensorError, KeyError, ValueError, DataError) as error:
            raise StoreError(f"{file} is no file of directions: {error}") from error


def _checked(site: object, values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()
    try:
        array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"the directions at {site} are not numbers: {error}") from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise DataError(f"directions at {site} are [n, size], not {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DataError(f"a direction at {site} is not finite")
    return array
