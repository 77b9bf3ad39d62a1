"""Tensors over HTTP without JSON: the forms of bodies, for doors and for clients alike.

`negotiating` says which form a request has and which its answer gets; `packed`, `raw`, `arrow` and
`arrow_writing` (over `flat`) read and write three of them; `memory` is what they make of one
tensor's bytes; `inflating` is what a compressed body holds, `deflating` makes one, as `preferences`
ask for. Nothing in here knows signatures, sockets or JAX, and nothing from the other side is
evaluated.
"""

from __future__ import annotations

from cluster.forms.deflating import NotAcceptable, Packing
from cluster.forms.inflating import ENCODINGS, BodyTooLarge, UnknownEncoding
from cluster.forms.negotiating import HEAD_LENGTH, Form, Forms, forms_of
from cluster.forms.values import Columns, Written

__all__ = [
    "ENCODINGS",
    "HEAD_LENGTH",
    "BodyTooLarge",
    "Columns",
    "Form",
    "Forms",
    "NotAcceptable",
    "Packing",
    "UnknownEncoding",
    "Written",
    "forms_of",
]
