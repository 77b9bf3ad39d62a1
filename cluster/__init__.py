"""The cluster: what is served, where it runs, and the doors through which it is asked."""

from cluster._version import __version__

#: Whose package this is; checked at start (`cluster.ownership`).
__distribution__ = "shardserve"

__all__ = ["__version__"]
