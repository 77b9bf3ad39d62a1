"""TensorFlow Serving's own cases of life cycles, resources and configuration, and who holds them.

`CASES` is the list: what its managers, its resource tracker and its configuration are tested for,
and the tests here that say the same, or why there is nothing to say. Those that no other file had
are below.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from batching.errors import DataLoss, Internal, Unavailable
from cluster.config import VersionPolicy
from cluster.control import Declared, ListStore, Load, Publish, ReadManifest, Unload
from tests.cluster.control_fakes import begun, config, loading, manifest, map_unit, of
from tests.cluster.test_reservations import fleet, load_of, why

HERE = Path(__file__).parent
SHARDS = "../shards/"

#: Case to the tests that hold it, or to why there are none.
CASES: dict[str, tuple[str, ...] | str] = {
    # Lives
    "E1 latest, and specific versions": (
        "test_routes:test_no_version_means_the_highest_number",
        "test_routes:test_a_version_is_found_by_number_and_by_label",
    ),
    "E2 version 0 is a version": "versions are numbered from 1",
    "E3 unknown names and versions": (
        "test_routes:test_what_is_not_served_is_refused_in_tensorflow_servings_words",
    ),
    "E4 nothing of a name is aspired": (
        "test_control:test_a_servable_that_is_left_out_is_unloaded_and_others_are_not",
    ),
    "E5 one version is left out": (
        "test_control:test_a_version_left_out_of_specific_is_unloaded_alone",
    ),
    "E6 back to a smaller number": (
        "test_control:test_rollback_loads_the_older_then_drains_the_newer",
    ),
    "E7 unloads before loads": ("test_versions:test_the_policy",),
    "E8 a failed load takes nothing away": (
        "test_control_failures:test_a_failed_load_leaves_the_older_version_serving_and_says_why",
        "test_versions:test_the_policy",
    ),
    "E9 failed stays failed until somebody says otherwise": (
        "test_control_failures:test_a_failure_that_another_try_cannot_mend_is_tried_once",
        "test_control_failures:test_a_failed_version_is_tried_again_when_its_declaration_changes",
    ),
    "E10 aspired again at once": (
        "test_control:test_a_rollback_while_the_old_version_drains_loads_nothing",
        "test_control:test_a_version_aspired_again_while_it_unloads_waits_and_loads_exactly_once",
    ),
    "E11 a source that brings an error": (
        "test_control_failures:test_a_manifest_that_cannot_be_read_is_a_failed_version",
    ),
    "E12 states of a life": (
        "test_control:test_a_listed_version_is_read_placed_loaded_and_published",
        "test_lifecycle:test_the_public_story_is_that_of_tensorflow_serving",
    ),
    "E13 states of a life that fails": (
        "test_lifecycle:test_a_failed_load_goes_from_loading_to_end",
        "test_cases:test_e13_routers_are_told_of_a_failed_life_in_order",
    ),
    "E14 retries that succeed, and that do not": (
        "test_control_failures:test_a_retry_that_succeeds_is_available_without_an_error",
        "test_control_failures:test_a_retriable_failure_is_tried_again_later_and_later_and_then_left",
    ),
    "E15 cancelled while it loads, or is to be tried again": (
        "test_control:test_a_load_that_is_no_longer_wanted_is_cancelled",
        "test_cases:test_e15_what_is_no_longer_wanted_is_not_tried_again",
    ),
    "E16 what another try cannot mend": (
        "test_control_failures:test_a_failure_that_another_try_cannot_mend_is_tried_once",
    ),
    "E17 one load of a version at a time": (
        "test_control:test_repeated_events_ask_for_nothing_more",
        f"{SHARDS}test_hosting:test_an_order_that_was_carried_out_is_not_carried_out_again",
    ),
    "E18 who uses a version keeps it": (
        "test_control:test_the_old_version_is_unloaded_when_the_last_router_has_moved_on",
    ),
    "E19 an unload of what is not loaded": ("test_control:test_a_made_up_answer_is_ignored",),
    "E20 what has failed is known, and forgotten when it is not wanted": (
        "test_cases:test_e20_a_failed_version_stays_known_until_it_is_no_longer_wanted",
    ),
    "E21 another pool for loads": "there is none that could be changed",
    "E22 who waits is told when all have ended, well or not": (
        "test_settling:test_a_version_on_its_way_is_waited_for_and_the_old_one_until_it_is_gone",
        "test_settling:test_a_failed_version_ends_the_wait_with_its_words",
    ),
    "E23 loads on demand": "nothing is loaded because of a request",
    "E24 a fixed set without one, or with one twice": (
        "test_config:test_a_mistake_is_told_with_its_path",
    ),
    # Resources
    "F1 two that fit load at once": (
        "test_reservations:test_two_versions_that_load_at_once_are_promised_different_memory",
    ),
    "F2 one that does not fit": (
        "test_control_failures:test_a_version_without_room_says_what_is_short_and_loads_when_there_is_room",
    ),
    "F3 a failed load gives its promise back": (
        "test_cases:test_f3_a_failed_load_gives_its_promise_back",
    ),
    "F4 less is needed than was promised": (
        "test_reservations:test_a_promise_becomes_what_was_measured",
    ),
    "F5 who waits for an unload": (
        "test_control_failures:test_a_version_waits_for_room_that_is_about_to_be_free",
    ),
    "F6 who is refused holds up nobody": (
        "test_cases:test_f6_a_version_that_does_not_fit_holds_up_no_other",
    ),
    "F7 needs that cannot be told, now or ever": (
        "test_cases:test_f7_a_manifest_is_asked_for_again_where_that_may_help",
    ),
    # Labels, configuration, sources
    "G1 labels": (
        "test_rollouts:test_g1_labels_of_available_versions_are_in_the_epoch_that_names_them",
        "test_routes:test_what_is_not_served_is_refused_in_tensorflow_servings_words",
    ),
    "G2 a label for what is not available": ("test_edits:test_what_is_refused",),
    "G3 a label that waits": ("test_edits:test_what_comes_of_an_edit",),
    "G4 a label that serves waits where it is": (
        "test_rollouts:test_g4_a_label_that_waits_is_refused_with_why_and_an_unknown_one_as_ever",
        "test_rollouts:test_a_failed_load_moves_no_label_and_the_status_says_for_what_it_waits",
    ),
    "G5 labels that are forbidden": "labels are always allowed",
    "G6 a name twice": (
        "test_config:test_a_mistake_is_told_with_its_path",
        "test_edits:test_a_declaration_that_cannot_be_meant_is_refused_whole",
    ),
    "G7 relative and empty paths": (
        "test_config:test_a_relative_store_lies_beside_the_file",
        "test_config:test_a_mistake_is_told_with_its_path",
    ),
    "G8 unknown platforms": "a manifest says what its units are",
    "G9 what cannot change while it runs": (
        "test_control_failures:test_what_a_running_cluster_cannot_change_is_refused_and_nothing_happens",
    ),
    "G10 a change that is waited for": (
        "test_admin:test_g10_a_load_that_is_waited_for_is_answered_when_it_is_available",
    ),
    "G11 left out": ("test_reload:test_g11_what_is_left_out_goes_and_g12_comes_back",),
    "G12 declared again": ("test_reload:test_g11_what_is_left_out_goes_and_g12_comes_back",),
    "G13 other versions are declared": ("test_reload:test_g13_versions_follow_what_is_declared",),
    "G14 one that cannot be loaded": (
        "test_reload:test_one_bad_servable_holds_up_no_other",
        "test_admin:test_a_load_that_fails_is_told_at_once",
    ),
    "G15 a file that does not parse": ("test_config:test_a_mistake_is_told_with_its_path",),
    "G16 the file is looked at again": "a declaration is applied by a command",
    "G17 never look again": ("test_config:test_a_mistake_is_told_with_its_path",),
    "G18 names of directories": (
        f"{SHARDS}test_store:test_only_numbers_with_a_manifest_are_versions",
    ),
    "G19 policies": ("test_versions:test_g19_aspired_versions",),
    "G20 a store that is away is not empty": (
        "test_reload:test_g20_an_empty_or_failing_listing_takes_neither_versions_nor_labels_away",
        f"{SHARDS}test_store:test_an_absent_store_is_not_an_empty_one",
    ),
    "G21 what is in both declarations": (
        "test_reload:test_g21_what_is_in_both_is_never_without_its_version",
    ),
    "G22 the time between two looks": (
        "test_reload:test_g22_the_time_between_two_looks_may_change",
    ),
}


def test_every_case_is_listed_once_and_in_order() -> None:
    expected = [f"{room}{n}" for room, last in (("E", 24), ("F", 7), ("G", 22)) for n in
                range(1, last + 1)]  # fmt: skip
    assert [case.split()[0] for case in CASES] == expected


@pytest.mark.parametrize("case", [case for case, held in CASES.items() if isinstance(held, tuple)])
def test_the_tests_of_a_case_exist(case: str) -> None:
    for named in CASES[case]:
        file, name = named.split(":")
        assert f"def {name}(" in (HERE / f"{file}.py").read_text(), named


def test_e13_routers_are_told_of_a_failed_life_in_order() -> None:
    shell = begun()
    (load,) = loading(shell, 1)
    shell.send(load.done(Internal("bug")))
    told = [
        status.state
        for publish in of(Publish, shell.effects)
        for status in publish.epoch.statuses
        if status.version == 1
    ]
    assert list(dict.fromkeys(told)) == ["START", "LOADING", "END"]
    assert told == sorted(told, key=["START", "LOADING", "END"].index)


def test_e15_what_is_no_longer_wanted_is_not_tried_again() -> None:
    shell = begun()
    shell.serve("m", 1)
    (load,) = loading(shell, 1, 2)
    shell.send(load.done(Unavailable("the store is slow")))
    shell.send(Declared(config=config("m", policy=VersionPolicy(specific=(1,)))))
    effects = shell.sleep(1000.0)
    assert not any(isinstance(each, ReadManifest | Load | Unload) for each in effects)
    assert shell.states()[1] == ("AVAILABLE", "OK")


def test_e20_a_failed_version_stays_known_until_it_is_no_longer_wanted() -> None:
    shell = begun()
    (load,) = loading(shell, 1)
    shell.send(load.done(Internal("bug")))
    shell.sleep(1000.0)
    (row,) = shell.core.status()["servables"]["m"]["versions"]
    assert (row["aspired"], row["step"], row["error_code"]) == (True, "END", "INTERNAL")
    shell.send(Declared(config=config()))
    assert shell.core.status()["servables"] == {}
    assert of(ListStore, shell.sleep(100.0)) == []


def test_f3_a_failed_load_gives_its_promise_back() -> None:
    shell = fleet("a", "b", devices=1)
    (load,) = load_of(shell, "a", 8)
    shell.send(load.done(Internal("bug")))
    assert shell.core.status()["actors"]["device-0"]["promised_bytes"] == 0
    assert len(load_of(shell, "b", 8)) == 1


def test_f6_a_version_that_does_not_fit_holds_up_no_other() -> None:
    shell = fleet("a", "b", "c", devices=1)
    (load,) = load_of(shell, "a", 4)
    assert load_of(shell, "b", 8) == []
    assert "2 B short" in why(shell, "b")
    (other,) = load_of(shell, "c", 4)
    shell.send(load.done(), other.done())
    assert (shell.versions("a"), shell.versions("c")) == ([1], [1])


@pytest.mark.parametrize(("error", "again"), [(Unavailable("slow"), True), (DataLoss(""), False)])
def test_f7_a_manifest_is_asked_for_again_where_that_may_help(
    error: Exception, again: bool
) -> None:
    shell = begun()
    (read,) = of(ReadManifest, shell.listed("m", 1))
    shell.send(read.failed(error))
    reads = of(ReadManifest, shell.sleep(1.0))
    assert len(reads) == again
    for each in reads:
        (load,) = of(Load, shell.send(each.done(manifest("m", 1, t=map_unit("t", 8)))))
        shell.send(load.done())
        assert shell.versions() == [1]
