"""The Ray shell of the controller: feeds `ControlCore` and carries its effects out.

Detached, restarted by Ray when it dies: a new process takes the next term, reads the declared
state, and finds the actors by name. Requests do not pass here; while it is away the data plane
serves on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from msgspec import structs
from ray.actor import ActorHandle
from ray.exceptions import RayError

from batching.errors import FailedPrecondition, Unavailable, error_of
from cluster.actor_specs import actor_spec
from cluster.carrying import Carrying, claim_when_there
from cluster.compactions import Compactor
from cluster.control import ControlCore, ControlSettings
from cluster.crew import Crew
from cluster.editing import take_edit
from cluster.edits import ReplaceConfig, encode_edit
from cluster.epochs import encode_epoch
from cluster.inbox import Inbox
from cluster.names import namespace
from cluster.nodes import accelerators, alive_nodes, nodes_seen, not_on, on_node
from cluster.registered import listed
from cluster.rehearsing import Ask, delegate
from cluster.reign import Deeds, Reign, ReignOver
from cluster.routers import Routers
from cluster.signals import (
    AcceleratorsFound,
    Allow,
    Effect,
    EnsureActor,
    Event,
    Listed,
    ListStore,
    Load,
    ManifestRead,
    Persist,
    Publish,
    ReadManifest,
    Rehearse,
    RouterLeased,
    StopActor,
    Tick,
    Unload,
)
from cluster.specs import (
    ControllerSpec,
    Membership,
    ServeDoorSpec,
)
from shards.actors import DeviceActor, HostActor, ShardActor
from shards.loop import LoopThread
from shards.orders import ActorKind, Outcome, decode, encode
from shards.store import open_store

__all__ = ["Controller"]

logger = logging.getLogger(__name__)

#: A router's poll is answered after this even without news, so that its lease is renewed.
_POLL_S = 2.0
_NODES_S = 2.0
#: Listings and manifests that are read at the same time.
_READERS = 8
_CLASSES: dict[ActorKind, type] = {
    "device": DeviceActor,
    "shard": ShardActor,
    "host": HostActor,
}


class Controller:
    """One reign. Methods are Ray calls; everything runs on a loop thread of its own."""

    def __init__(self, spec: bytes, secret: bytes) -> None:
        logging.basicConfig(level=os.environ.get("SHARDSERVE_LOG", "INFO"))
        self._spec = decode(spec, ControllerSpec)
        self._secret = secret
        self._namespace = namespace(self._spec.cluster)
        self._store = open_store(self._spec.store)
        self._accelerator, self._accelerators = accelerators()
        self._core = ControlCore(
            claim_when_there(self._store, self._spec.cluster),
            ControlSettings(accelerators=self._accelerators),
        )
        self._epoch = b""
        self._published = (0, 0)
        self._carrying = Carrying(
            self._carry_out,
            lambda effect: self._spawn(self._persist(effect)),
            self._core.put_back,
        )
        # What hangs holds up its own threads alone: the store, sources, and who keeps states.
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._sources = ThreadPoolExecutor(_READERS, thread_name_prefix="source")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._compactor = Compactor(f"{self._spec.cache_directory}/blobs")
        self._news = asyncio.Event()
        # By a task, since a core that fails on an event must end this process.
        self._inbox = Inbox(
            lambda delay_s, then: self._spawn(_called(delay_s, then)), self._take, time.monotonic
        )
        self._feed = self._inbox.put
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        logger.info("controller of %s: term %d", self._spec.cluster, self._core.term)
        self._io = LoopThread("controller-io")
        deeds = ThreadPoolExecutor(_READERS, thread_name_prefix="deed")
        self._deeds = Deeds(
            Reign(self._store, self._spec.cluster, self._core.term),
            lambda deed: self._io.loop.run_in_executor(deeds, deed),
        )
        self._routers = Routers(self._spec, self._secret, self._deeds, self._spawn)
        self._crew = Crew(
            self._core.term,
            self._deeds,
            nodes=self._usable_nodes,
            make=self._create,
            kill=ray.kill,
            feed=self._feed,
        )
        self._io.call(self._begin)

    # Ray calls

    async def apply(self, config: bytes) -> bytes:
        """Declare what should be served (`cluster.config.dump`); answers an `Edited`."""
        return await self.edit(encode_edit(ReplaceConfig(config=config)))

    async def edit(self, request: bytes) -> bytes:
        """Change what is declared, or show it (`cluster.edits.Edit`); answers an `Edited`."""
        return await self._io.wait(self._edit(request))

    async def status(self) -> dict[str, Any]:
        """Everything a person may want to know, as plain values."""
        return await self._io.wait(self._status())

    async def watch_epoch(self, router: str, have: tuple[int, int], oldest_live: int) -> bytes:
        """A router's long poll (`cluster.subscription`): a newer epoch, or b"" after a while."""
        return await self._io.wait(self._watch(router, tuple(have), oldest_live))

    async def join(self) -> bytes:
        """A `Membership`. Ray's token authentication guards the secret in it."""
        config = self._core.config
        if config is None:
            return encode(Membership(secret=self._secret))
        tls, transport = config.cluster.tls, config.cluster.transport
        files = tls.files() if tls else None
        return encode(Membership(secret=self._secret, tls=files, transport=transport))

    async def serve_door(self) -> bytes:
        """A `ServeDoorSpec`, or nothing before anything is declared."""
        config = self._core.config
        if config is None:
            return b""
        cluster = config.cluster
        return encode(
            ServeDoorSpec(
                host=cluster.serve.host,
                body_bytes_max=cluster.http.limits.body_bytes_max,
                compress_bytes_min=cluster.http.limits.compress_bytes_min,
                auth=cluster.auth,
            )
        )

    async def shut_down(self) -> None:
        """End every actor of the cluster, then this process for good."""
        await self._io.wait(self._shut_down())

    # The loop thread

    def _begin(self) -> None:
        self._spawn(self._tend_routers())
        self._feed(Tick())

    def _take(self, events: Sequence[Event]) -> None:
        """Hand events to the core and carry out what it asks for."""
        if not self._stopping:
            self._carrying.take(self._core.handle_all(events, time.monotonic()))
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup = self._core.next_wakeup()
        if wakeup is not None:
            delay_s = max(wakeup - time.monotonic(), 0.0) + 0.001
            self._timer = self._io.loop.call_later(delay_s, self._feed, Tick())

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Publish():
                self._epoch = encode_epoch(effect.epoch)
                self._published = (effect.epoch.term, effect.epoch.number)
                self._news.set()
                self._news = asyncio.Event()
                logger.info("epoch %d published", effect.epoch.number)
                self._compactor.look(self._core.config, effect.epoch)
            case EnsureActor():
                self._spawn(self._crew.ensure(effect))
            case StopActor():
                self._spawn(self._crew.stop(effect))
            case ListStore():
                self._spawn(self._list(effect))
            case ReadManifest():
                self._spawn(self._read(effect))
            case Load():
                order = encode(effect.order)
                self._spawn(self._order(effect.actor, "load", (order,), effect.done))
            case Rehearse():
                self._spawn(self._rehearse(effect))
            case Allow():
                order = encode(effect.order)
                self._spawn(self._order(effect.actor, "allow", (order,), effect.done))
            case Unload():
                args = (effect.term, effect.servable, effect.version)
                self._spawn(self._order(effect.actor, "unload", args, effect.done))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._io.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, ReignOver):
                logger.critical("controller: another one reigns: %s", error)
            else:
                # The core waits for an event that will not come: this process cannot go on.
                logger.critical("controller: a task failed", exc_info=error)
            os._exit(1)

    async def _persist(self, effect: Persist) -> None:
        args = (self._spec.cluster, effect.term, effect.seq, effect.data)
        try:
            await self._io.loop.run_in_executor(self._writer, self._store.put_state, *args)
        except FailedPrecondition as error:
            logger.critical("controller: another one reigns: %s", error)
            os._exit(1)
        except (OSError, Unavailable) as error:
            # What cannot be kept must not be done; the core asks again in a while.
            logger.error("controller: the state cannot be kept: %s", error)
            self._carrying.not_kept()
        else:
            self._carrying.kept()
        self._set_timer()

    # Effects

    def _create(self, name: str, kind: ActorKind, node: str) -> ActorHandle:
        config = self._core.config
        assert config is not None
        accelerator = self._accelerator if kind == "device" else ""
        spec = actor_spec(
            config.cluster,
            self._spec,
            name,
            kind,
            platforms="" if accelerator else "cpu",
            log=os.environ.get("SHARDSERVE_LOG", "INFO"),
        )
        actor = ray.remote(_CLASSES[kind]).options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            max_concurrency=1000,
            num_cpus=0,
            num_gpus=1 if accelerator == "GPU" else 0,
            resources={"TPU": 1} if accelerator == "TPU" else None,
            # Ray knows where its accelerators are. What needs none it would not spread evenly, and
            # would move off the named node if that were only a wish. A node that dies meanwhile
            # makes this fail, and the next attempt names another.
            scheduling_strategy="SPREAD" if accelerator else on_node(node),
            label_selector=not_on(self._core.avoided) if accelerator else None,
            enable_task_events=False,
            # No environment of Ray's: a process that has one starts twice, 0.3 s later.
        )
        handle: ActorHandle = actor.remote(encode(spec), self._secret)
        return handle

    async def _list(self, effect: ListStore) -> None:
        event: Listed
        try:
            threads = self._readers if effect.source is None else self._sources
            versions = await self._io.loop.run_in_executor(
                threads, listed, effect.servable, effect.source, self._store
            )
            event = effect.done(versions)
        except Exception as error:
            event = effect.failed(error)
        self._feed(event)

    async def _read(self, effect: ReadManifest) -> None:
        event: ManifestRead
        try:
            manifest = await self._io.loop.run_in_executor(
                self._readers, self._store.read_manifest, effect.servable, effect.version
            )
            event = effect.done(manifest)
        except Exception as error:
            event = effect.failed(error)
        self._feed(event)

    async def _rehearse(self, effect: Rehearse) -> None:
        def asks() -> list[Ask]:
            return [router.rehearse.remote for router in self._routers.handles]

        self._feed(await delegate(effect, asks))

    async def _order(
        self,
        actor: str,
        method: str,
        args: tuple[object, ...],
        done: Callable[[BaseException | None], Event],
    ) -> None:
        handle = self._crew.handle(actor)
        if handle is None:
            return  # it was lost meanwhile, and the core has been told
        try:
            outcome = decode(await getattr(handle, method).remote(*args), Outcome)
        except RayError:
            return  # its loss is reported by whoever watches it
        is_done = outcome.code == "OK"
        self._feed(done(None if is_done else error_of(outcome.code, outcome.message)))

    # Routers

    async def _tend_routers(self) -> None:
        """Keep routers on every node, and count the accelerators that nodes bring."""
        while not self._stopping:
            config = self._core.config
            if config is not None:
                await self._count_accelerators()
                seen = await asyncio.to_thread(nodes_seen, self._accelerator)
                self._feed(seen)
                await self._routers.tend(seen.memory_bytes, config.cluster)
            await asyncio.sleep(_NODES_S)

    async def _usable_nodes(self) -> list[str]:
        nodes = await asyncio.to_thread(alive_nodes)
        # Where all others are gone, a drained one is better than none.
        return [node for node in nodes if node not in self._core.avoided] or nodes

    async def _count_accelerators(self) -> None:
        # Of a kind that there was none of at the start, none is used: device actors run without.
        name, count = await asyncio.to_thread(accelerators)
        if name == self._accelerator and count > self._accelerators:
            logger.info("%d accelerators, after %d", count, self._accelerators)
            self._accelerators = count
            self._feed(AcceleratorsFound(count=count))

    async def _watch(self, router: str, have: tuple[int, ...], oldest_live: int) -> bytes:
        news = self._news
        self._feed(RouterLeased(router=router, oldest_live_epoch=oldest_live, epoch=have[1]))
        if self._published > have:
            return self._epoch
        try:
            await asyncio.wait_for(news.wait(), _POLL_S)
        except TimeoutError:
            return b""
        return self._epoch

    # The rest

    async def _edit(self, request: bytes) -> bytes:
        return take_edit(self._core, request, self._inbox.put_now)

    async def _status(self) -> dict[str, Any]:
        status = self._core.status()
        for name, actor in status["actors"].items():
            actor["pid"] = self._crew.pid(name)
        status["doors"] = [structs.asdict(address) for address in self._routers.addresses]
        status["compactions"] = self._compactor.status()
        status["pid"] = os.getpid()
        return status

    async def _shut_down(self) -> None:
        self._stopping = True
        self._routers.stop()
        self._compactor.close()
        if self._timer is not None:
            self._timer.cancel()
        handles = [*self._routers.handles, *self._crew.handles()]
        await asyncio.gather(*(self._crew.end(handle, blindly=True) for handle in handles))


async def _called(delay_s: float, then: Callable[[], None]) -> None:
    if delay_s > 0.0:
        await asyncio.sleep(delay_s)
    then()
