"""The demo: two real models on real data, saved, served and checked over HTTP.

``minilm`` is a sentence encoder that searches Python's own documentation; ``digits`` classifies
handwritten digits. Their weights and data come from installed packages, never from the network.
Importing this package imports no JAX: a router or the command line may do it.
"""

from cluster.demo.errors import BadReply, FilesMissing, RequestRefused, ServerUnreachable

__all__ = ["BadReply", "FilesMissing", "RequestRefused", "ServerUnreachable"]
