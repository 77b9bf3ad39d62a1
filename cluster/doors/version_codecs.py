"""One served version at a door: what reads its bodies, prints its answers and counts them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.api import ColumnsParser, ExamplesCodec, ExamplesParser, Parsed, RequestParser, Verb
from cluster.doors.request_log import Logging
from cluster.doors.shadowing import Copying
from cluster.forms import Forms
from cluster.metrics import Metrics
from cluster.routes import Served

__all__ = ["VersionCodecs"]


class VersionCodecs:
    """One served version with the codecs that its bodies need."""

    __slots__ = (
        "_columns", "classify", "copying", "header", "logging", "metrics", "parser",
        "plain_forms", "plain_headers", "regress", "served", "signatures",
    )  # fmt: skip

    def __init__(self, served: Served, metrics: Metrics) -> None:
        signatures = served.manifest.signatures
        self.served = served
        #: for the process that reads what is not read here
        self.signatures = msgspec.msgpack.encode(signatures)
        #: what reads bodies without JSON, by API, once there was one
        self._columns: dict[Verb, ColumnsParser] = {}
        self.parser = RequestParser(signatures)
        self.classify = ExamplesParser(signatures, "classify")
        self.regress = ExamplesParser(signatures, "regress")
        #: says which version answered; TensorFlow Serving's REST replies leave users guessing
        self.header = b"x-servable-version: %d\r\n" % served.version
        self.metrics = metrics.of(served.servable, served.version)
        #: how its requests are copied for a candidate, if they are
        self.copying: Copying | None = None
        #: how some of them are kept, if they are
        self.logging: Logging | None = None
        #: headers that were found to say nothing about deadline or trace, and to be allowed
        self.plain_headers: Mapping[bytes, bytes] | None = None
        #: the forms that these headers ask for; None where they are JSON
        self.plain_forms: Forms | None = None

    def parser_of(self, verb: Verb) -> RequestParser | ExamplesParser:
        """What reads the bodies of an API."""
        if verb is Verb.PREDICT:
            return self.parser
        return self.classify if verb is Verb.CLASSIFY else self.regress

    def columns_of(self, verb: Verb) -> ColumnsParser:
        """What reads the bodies without JSON of an API."""
        found = self._columns.get(verb)
        if found is None:
            examples = None if verb is Verb.PREDICT else self.parser_of(verb)
            assert not isinstance(examples, RequestParser)
            found = ColumnsParser(self.served.manifest.signatures, examples)
            self._columns[verb] = found
        return found

    def codec(self, verb: Verb, parsed: Parsed) -> ExamplesCodec | None:
        """What prints the answer; None for predict."""
        if verb is Verb.PREDICT:
            return None
        parser = self.classify if verb is Verb.CLASSIFY else self.regress
        return parser.codecs[parsed.signature_name]
