"""What the controller core hears (events) and asks for (effects): values only.

A shell carries effects out in the order given and feeds every outcome back as an event. Each
effect that has an outcome can name it itself: `Load.done()`, `ListStore.done(versions)` and so on,
so a shell never puts an answer together by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from batching.errors import Code, ServingError
from cluster.config import Config, Registered
from cluster.epochs import Epoch, Rehearsal
from shards.manifest import Manifest
from shards.orders import ActorKind, ActorReport, AllowOrder, Endpoint, LoadOrder

__all__ = [
    "AcceleratorsFound",
    "NodesDrained",
    "NodesSeen",
    "ActorLost",
    "ActorUp",
    "Allow",
    "Allowed",
    "Declared",
    "Effect",
    "EnsureActor",
    "Event",
    "Failure",
    "ListStore",
    "Listed",
    "Load",
    "Loaded",
    "Look",
    "ManifestRead",
    "Persist",
    "Publish",
    "ReadManifest",
    "RebalanceAsked",
    "Rehearse",
    "Rehearsed",
    "Replay",
    "RouterGone",
    "RouterLeased",
    "StopActor",
    "Tick",
    "Unload",
    "Unloaded",
    "Warming",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why something failed, as data.

    Attributes:
        code: a canonical code.
        message: for people.
    """

    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException | Failure) -> Failure:
        """The failure that an exception stands for; a failure is itself."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, ServingError):
            return cls(code=str(error.code), message=str(error))
        return cls(code=str(Code.INTERNAL), message=f"{type(error).__name__}: {error}")


# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """Someone declared what should be served."""

    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The complete versions of a servable in the store, or why they are not known."""

    servable: str
    versions: tuple[int, ...] = ()
    error: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Someone wants the store to be looked into now, and what has failed to be tried again."""

    servable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRead:
    """A version's manifest, or why it could not be read."""

    servable: str
    version: int
    manifest: Manifest | None = None
    error: Failure | None = None

    def __post_init__(self) -> None:
        assert (self.manifest is None) != (self.error is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorUp:
    """An actor runs and says what it is and holds. May be repeated to refresh the figures."""

    report: ActorReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLost:
    """An actor's process is gone, or never came up.

    Attributes:
        name: the actor.
        generation: of the process that is gone; 0 where it never reported one.
        reason: for people.
    """

    name: str
    generation: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warming:
    """An actor has the weights of an order in place and compiles. May be left out."""

    actor: str
    generation: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An actor carried out a load order, or failed to and holds nothing of it."""

    actor: str
    generation: int
    servable: str
    version: int
    number: int
    error: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A version's warm-up requests were answered, or why they were not."""

    servable: str
    version: int
    number: int
    error: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """An actor answered what its servables are allowed."""

    actor: str
    generation: int
    servable: str
    error: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """An actor let go of a version, or failed to."""

    actor: str
    generation: int
    servable: str
    version: int
    number: int
    error: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLeased:
    """A router lives and names the oldest epoch that a request of its is pinned to.

    A router that has no epoch yet says 0; it must be heard so *before* it is given one.

    Attributes:
        router: its name.
        oldest_live_epoch: that a request of its is pinned to.
        epoch: by which it answers what comes now; 0 where it does not say.
    """

    router: str
    oldest_live_epoch: int
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterGone:
    """A router's process is gone, and with it every request that it had pinned."""

    router: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorsFound:
    """So many accelerators are in the cluster. Fewer than there were is no news: actors tell."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesSeen:
    """The nodes that live.

    Attributes:
        memory_bytes: of each; 0 where that is not known.
        accelerators: of those that have any.
    """

    memory_bytes: Mapping[str, int]
    accelerators: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesDrained:
    """All nodes on which no actor should be."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceAsked:
    """The load of shard actors should be made even, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = (
    Declared
    | Listed
    | Look
    | ManifestRead
    | ActorUp
    | ActorLost
    | Warming
    | Loaded
    | Rehearsed
    | Allowed
    | Unloaded
    | RouterLeased
    | RouterGone
    | AcceleratorsFound
    | NodesSeen
    | NodesDrained
    | RebalanceAsked
    | Tick
)


# Effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Keep the state durably before anything that follows in the same list.

    A shell that cannot because another controller reigns must drop the rest and end itself; one
    that cannot because the store is away gives it back with the rest: `ControlCore.put_back`.
    """

    term: int
    seq: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Give the epoch to every router; only the latest one matters."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureActor:
    """See that the actor runs, starting it where it does not; harmless to repeat.

    Answered by `ActorUp`, or by `ActorLost` with generation 0 where it cannot be started.
    """

    name: str
    kind: ActorKind


@dataclass(frozen=True, slots=True, kw_only=True)
class StopActor:
    """End an actor that nothing needs.

    Answered by `ActorLost` of its generation, also where the process is gone already.
    """

    name: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListStore:
    """List a servable's complete versions.

    Attributes:
        source: what says which there are; None where that is the store.
    """

    servable: str
    source: Registered | None = None

    def done(self, versions: tuple[int, ...]) -> Listed:
        """The event for a listing."""
        return Listed(servable=self.servable, versions=versions)

    def failed(self, error: BaseException | Failure) -> Listed:
        """The event for a listing that could not be made."""
        return Listed(servable=self.servable, error=Failure.of(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadManifest:
    """Read a version's manifest."""

    servable: str
    version: int

    def done(self, manifest: Manifest) -> ManifestRead:
        """The event for a manifest."""
        return ManifestRead(servable=self.servable, version=self.version, manifest=manifest)

    def failed(self, error: BaseException | Failure) -> ManifestRead:
        """The event for a manifest that could not be read."""
        return ManifestRead(servable=self.servable, version=self.version, error=Failure.of(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Give an actor a load order. The same order again joins the one that is under way.

    An actor that holds or loads *other* parts of the version, on an order of an earlier reign,
    answers UNAVAILABLE; it is told to let go of those once its report has shown them.

    Attributes:
        number: distinct for every order of a reign; the answer repeats it.
    """

    actor: str
    generation: int
    number: int
    order: LoadOrder

    def warming(self) -> Warming:
        """The event for weights that are in place."""
        return Warming(actor=self.actor, generation=self.generation, number=self.number)

    def done(self, error: BaseException | Failure | None = None) -> Loaded:
        """The event for the order's end; the actor's death is an `ActorLost` instead."""
        return Loaded(
            actor=self.actor,
            generation=self.generation,
            servable=self.order.servable,
            version=self.order.version,
            number=self.number,
            error=None if error is None else Failure.of(error),
        )


class Replay(NamedTuple):
    """A replay of warm-up requests that was asked for.

    Attributes:
        number: of the request to replay.
        at: when it was made.
        endpoints: the processes that are asked; the answer holds for no others.
    """

    number: int
    at: float
    endpoints: Mapping[str, Endpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearse:
    """Have some router replay a version's warm-up requests. May be done twice; changes nothing.

    Attributes:
        number: distinct for every one of a reign; the answer repeats it.
    """

    number: int
    order: Rehearsal

    def done(self, error: BaseException | Failure | None = None) -> Rehearsed:
        """The event for the last request's end, or for the first that failed."""
        manifest = self.order.served.manifest
        return Rehearsed(
            servable=manifest.name,
            version=manifest.version,
            number=self.number,
            error=None if error is None else Failure.of(error),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Tell an actor to let go of a version, also one that is still loading.

    An actor that holds nothing of it answers like one that let go.

    Attributes:
        number: as of `Load`.
    """

    actor: str
    generation: int
    number: int
    servable: str
    version: int
    term: int

    def done(self, error: BaseException | Failure | None = None) -> Unloaded:
        """The event for the order's end."""
        return Unloaded(
            actor=self.actor,
            generation=self.generation,
            servable=self.servable,
            version=self.version,
            number=self.number,
            error=None if error is None else Failure.of(error),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """Tell an actor what a servable that it holds is allowed from now on."""

    actor: str
    generation: int
    order: AllowOrder

    def done(self, error: BaseException | Failure | None = None) -> Allowed:
        """The event for the order's end."""
        return Allowed(
            actor=self.actor,
            generation=self.generation,
            servable=self.order.servable,
            error=None if error is None else Failure.of(error),
        )


Effect = (
    Persist
    | Publish
    | EnsureActor
    | StopActor
    | ListStore
    | ReadManifest
    | Load
    | Rehearse
    | Unload
    | Allow
)
