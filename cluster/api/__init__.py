"""TensorFlow Serving's REST API as functions: bytes in, values out; values in, bytes out.

No socket, no event loop, no servable: a door feeds these functions and a router acts on what they
return. See `paths` for the request line, `predict` and `examples` for request bodies (`columns` for
those without JSON), `replies` for answers, `describe` for status and metadata, `status` for errors.
"""

from __future__ import annotations

from cluster.api.columns import ColumnsParser
from cluster.api.describe import list_body, metadata_body, status_body
from cluster.api.examples import ExamplesCodec, ExamplesParser
from cluster.api.paths import Call, Verb, parse_path
from cluster.api.predict import PredictCodec, RequestParser
from cluster.api.printing import plain_floats
from cluster.api.reading_rows import make_ready
from cluster.api.replies import (
    render_classify,
    render_predictions,
    render_regress,
    render_rows_plain,
)
from cluster.api.status import CONTENT_TYPE, HTTP_STATUS, error_body, http_status, retry_after
from cluster.api.values import DEFAULT_SIGNATURE, Parsed

__all__ = [
    "CONTENT_TYPE",
    "DEFAULT_SIGNATURE",
    "HTTP_STATUS",
    "Call",
    "ColumnsParser",
    "ExamplesCodec",
    "ExamplesParser",
    "Parsed",
    "PredictCodec",
    "RequestParser",
    "Verb",
    "error_body",
    "http_status",
    "list_body",
    "make_ready",
    "metadata_body",
    "parse_path",
    "plain_floats",
    "render_classify",
    "render_predictions",
    "render_regress",
    "render_rows_plain",
    "retry_after",
    "status_body",
]
