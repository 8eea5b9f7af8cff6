"""Rows of the table of malformed input: LeRobotDatasets."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pyarrow as pa

from bad_inputs.place import Command, Place, Row, cut, edit_json, pi0
from bad_inputs.tables import (
    CAMERA,
    DATA,
    EPISODES,
    FROM,
    INFO,
    TASKS,
    TO,
    VIDEO,
    Change,
    all_of,
    at,
    every,
    feature,
    halved,
    in_info,
    in_picture,
    in_table,
    other_task,
    other_video,
    picture,
    removed,
    rewritten,
    swap,
    undeclared,
    with_values,
    without,
)

Spoiled = tuple[str, Change, tuple[str, ...]]
"""What is wrong, how it becomes so, and words of the sentence."""

DECLARATION: tuple[Spoiled, ...] = (
    ("no info.json", removed(INFO), ("<dataset>", "meta/info.json")),
    ("an info.json that is not JSON", rewritten(INFO, "{"), ("<dataset>/meta/info.json",)),
    ("an info.json that is a list", rewritten(INFO, "[]"), ("<dataset>/meta/info.json",)),
    ("a binary info.json", rewritten(INFO, b"\xff\xfe\x00"), ("<dataset>/meta/info.json",)),
    (
        "no version",
        in_info(lambda info: info.pop("codebase_version")),
        ("meta/info.json", "codebase_version"),
    ),
    (
        "version 2",
        in_info(lambda info: info.update(codebase_version="v2.1")),
        ("v2.1", "convert_dataset_v21_to_v30"),
    ),
    ("version 9", in_info(lambda info: info.update(codebase_version="v9.0")), ("v9",)),
    ("no features", in_info(lambda info: info.pop("features")), ("<dataset>", "features")),
    ("features that are a list", in_info(lambda info: info.update(features=[])), ("features",)),
    ("no frame rate", in_info(lambda info: info.pop("fps")), ("<dataset>", "fps")),
    ("0 frames a second", in_info(lambda info: info.update(fps=0)), ("<dataset>", "fps", "0")),
    ("a word for a frame rate", in_info(lambda info: info.update(fps="fast")), ("fps", "fast")),
    ("a negative frame rate", in_info(lambda info: info.update(fps=-20)), ("fps", "-20")),
    (
        "data outside of the folder",
        in_info(lambda info: info.update(data_path="../../{chunk_index}/{file_index}.parquet")),
        ("<dataset>", "data_path"),
    ),
    (
        "an unknown part in the path of the data",
        in_info(lambda info: info.update(data_path="data/{secret}.parquet")),
        ("data_path", "secret"),
    ),
    (
        "videos outside of the folder",
        in_info(lambda info: info.update(video_path="../{video_key}/{file_index}.mp4")),
        ("<dataset>", "video_path"),
    ),
    (
        "videos at an absolute path",
        in_info(lambda info: info.update(video_path="/etc/{video_key}.mp4")),
        ("<dataset>", "video_path"),
    ),
    (
        "videos at a network address",
        in_info(lambda info: info.update(video_path="http://localhost/{video_key}.mp4")),
        ("<dataset>", "http://localhost"),
    ),
    ("no state", undeclared("observation.state"), ("<dataset>", "'observation.state'")),
    ("no action", undeclared("action"), ("<dataset>", "'action'")),
    ("an action on two axes", feature("action", shape=[7, 1]), ("<dataset>", "action")),
    ("an action of no axis", feature("action", shape=[]), ("<dataset>", "action")),
    ("an action of 10^12 numbers", feature("action", shape=[10**12]), ("action", "1000000000000")),
    ("an action of -7 numbers", feature("action", shape=[-7]), ("action", "-7")),
    ("a declared state of 6 numbers", feature("observation.state", shape=[6]), ("state", "6", "9")),
    ("a column that is declared and missing", without(DATA, "next.reward"), ("next.reward",)),
    ("a camera on two axes", feature(CAMERA, shape=[96, 96]), ("agentview", "96")),
    (
        "a picture of 10^12 pixels",
        feature(CAMERA, shape=[10**6, 10**6, 3]),
        ("agentview", "1000000"),
    ),
    ("a picture without a pixel", feature(CAMERA, shape=[0, 96, 3]), ("agentview", "0")),
    ("a picture of two channels", feature(CAMERA, shape=[96, 96, 2]), ("agentview", "2")),
    ("a declared size that is not the video's", feature(CAMERA, shape=[48, 48, 3]), ("48", "96")),
)

META: tuple[Spoiled, ...] = (
    ("no tasks", removed(TASKS), ("<dataset>", "tasks")),
    ("tasks that are no parquet file", rewritten(TASKS, "lift"), ("<dataset>", "tasks.parquet")),
    ("half of the tasks' file", halved(TASKS), ("<dataset>", "tasks.parquet")),
    ("no row of tasks", in_table(TASKS, lambda table: table.slice(0, 0)), ("task",)),
    ("tasks without their numbers", without(TASKS, "task_index"), ("task_index",)),
    ("a number that no task has", with_values(TASKS, "task_index", at(0, 5)), ("task", "0")),
    ("no list of episodes", removed(EPISODES), ("<dataset>", "episodes")),
    ("episodes that are no parquet file", rewritten(EPISODES, "PAR1"), ("<dataset>", "episodes")),
    ("an empty list of episodes", rewritten(EPISODES, b""), ("<dataset>", "episodes")),
    ("episodes without numbers", without(EPISODES, "episode_index"), ("episode_index",)),
    ("episodes without lengths", without(EPISODES, "length"), ("length",)),
    ("episodes without their video's start", without(EPISODES, FROM), (FROM,)),
    ("episodes without their file", without(EPISODES, "data/file_index"), ("data/file_index",)),
    (
        "fewer episodes than declared",
        in_table(EPISODES, lambda table: table.slice(0, 1)),
        ("1", "120"),
    ),
    (
        "a video's start that is not a number",
        with_values(EPISODES, FROM, at(1, float("nan"))),
        ("episode 1", "nan"),
    ),
    (
        "a start after the video's end",
        all_of(with_values(EPISODES, FROM, at(1, 1e6)), with_values(EPISODES, TO, at(1, 1e6 + 3))),
        ("file-000.mp4", "episode 1"),
    ),
    ("another length than there are rows", with_values(EPISODES, "length", at(1, 3)), ("1", "3")),
)

FRAMES: tuple[Spoiled, ...] = (
    ("no data", removed(DATA), ("<dataset>",)),
    ("an empty file of data", rewritten(DATA, b""), ("<dataset>",)),
    ("half of the data's file", halved(DATA), ("<dataset>",)),
    ("data that is no parquet file", rewritten(DATA, "state,action\n"), ("<dataset>",)),
    ("a file without rows", in_table(DATA, lambda table: table.slice(0, 0)), ("<dataset>",)),
    ("no column of actions", without(DATA, "action"), ("<dataset>", "action")),
    ("no column of times", without(DATA, "timestamp"), ("<dataset>", "timestamp")),
    ("no column of episodes", without(DATA, "episode_index"), ("<dataset>", "episode_index")),
    ("no column of tasks", without(DATA, "task_index"), ("<dataset>", "task_index")),
    (
        "one action is NaN",
        with_values(DATA, "action", at(5, float("nan"), 2)),
        ("action", "episode 0", "frame 5"),
    ),
    (
        "one action is infinite",
        with_values(DATA, "action", at(5, float("inf"), 2)),
        ("action", "episode 0", "frame 5"),
    ),
    (
        "one state is NaN",
        with_values(DATA, "observation.state", at(3, float("nan"), 0)),
        ("observation.state", "episode 0", "frame 3"),
    ),
    (
        "one reward is NaN",
        with_values(DATA, "next.reward", at(3, float("nan"))),
        ("next.reward", "episode 0", "frame 3"),
    ),
    (
        "one action is a million",
        with_values(DATA, "action", at(5, 1e6, 2)),
        ("action[2]", "episode 0", "frame 5"),
    ),
    (
        "one state is 10^8",
        with_values(DATA, "observation.state", at(6, 1e8, 1)),
        ("observation.state[1]", "episode 0", "frame 6"),
    ),
    ("states of words", with_values(DATA, "observation.state", every(lambda _: "up")), ("state",)),
    ("actions of 6 numbers", with_values(DATA, "action", every(lambda a: a[:6])), ("action", "7")),
    ("one action of 6 numbers", with_values(DATA, "action", at(4, [0.0] * 6)), ("action",)),
    ("one action is missing", with_values(DATA, "action", at(4, None)), ("action",)),
    (
        "rewards that are words",
        with_values(DATA, "next.reward", every(lambda _: "good")),
        ("next.reward",),
    ),
    (
        "a reward between 0 and 1",
        with_values(DATA, "next.reward", at(2, 0.3)),
        ("next.reward", "0.3", "--dataset.reward=success"),
    ),
    (
        "a time that is 20 ms off",
        with_values(DATA, "timestamp", at(4, 0.22)),
        ("episode 0", "frame 4"),
    ),
    (
        "a time that is not a number",
        with_values(DATA, "timestamp", at(4, float("nan"))),
        ("timestamp", "episode 0", "frame 4"),
    ),
    (
        "two frames in the wrong order",
        with_values(DATA, "frame_index", swap(3, 4)),
        ("episode 0",),
    ),
    ("a frame of another episode", with_values(DATA, "episode_index", at(3, 1)), ("episode",)),
    ("no frame is new", with_values(DATA, "frame_is_new", every(lambda _: False)), ("episode 0",)),
    (
        "a task that changes on the way",
        all_of(
            in_table(TASKS, lambda t: pa.concat_tables([t, other_task(t)])),
            with_values(DATA, "task_index", at(5, 1)),
        ),
        ("task", "episode 0"),
    ),
    (
        "a number of a task that is not there",
        with_values(DATA, "task_index", every(lambda _: 7)),
        ("task", "7"),
    ),
    ("neither rewards nor success", undeclared("next.reward", "next.success"), ("no reward",)),
    ("no video", removed(VIDEO), ("file-000.mp4",)),
    ("an empty video", rewritten(VIDEO, b""), ("file-000.mp4",)),
    ("a text for a video", rewritten(VIDEO, "no film"), ("file-000.mp4",)),
    ("the beginning of a video", lambda root: cut(root / VIDEO, 0.001), ("file-000.mp4",)),
    ("a video of another size", other_video(32, 400), ("agentview", "96", "32")),
    ("a video that is too short", other_video(96, 3), ("file-000.mp4",)),
)


PICTURES: tuple[Spoiled, ...] = (
    (
        "a path for a picture",
        in_picture(lambda p: p.update(bytes=None, path="/etc/hostname")),
        ("agentview", "/etc/hostname"),
    ),
    (
        "a network address for a picture",
        in_picture(lambda p: p.update(bytes=None, path="http://localhost/x.png")),
        ("agentview", "http://localhost/x.png"),
    ),
    (
        "noise for a picture",
        in_picture(lambda p: p.update(bytes=b"noise")),
        ("agentview", "episode 0"),
    ),
    (
        "a picture of another size",
        in_picture(lambda p: p.update(bytes=picture((16, 16)))),
        ("agentview", "16", "32"),
    ),
    ("a picture is missing", with_values(DATA, CAMERA, at(0, None)), ("agentview", "episode 0")),
)


def _as_column(column: str) -> Change:
    """A column that is in no row true."""

    def declare(info: Any) -> None:
        info["features"][column] = {"dtype": "bool", "shape": [1], "names": None}

    def append(table: pa.Table) -> pa.Table:
        return table.append_column(column, pa.array([False] * table.num_rows))

    return all_of(in_info(declare), in_table(DATA, append))


LONG = "lift the cube and put it on the plate beside the window"
SECOND: tuple[Spoiled, ...] = (
    (
        "another rate than the first's",
        all_of(
            in_info(lambda info: info.update(fps=10)),
            with_values(DATA, "timestamp", every(lambda second: 2 * second)),
        ),
        ("<dataset>", "10", "20"),
    ),
    (
        "a camera less than the first",
        in_info(lambda info: info["features"].pop(CAMERA)),
        ("<dataset>", "agentview"),
    ),
    (
        "actions in other units than the policy's",
        with_values(DATA, "action", every(lambda a: [number / 57.3 for number in a])),
        ("action", "hardly moves", "units"),
    ),
    (
        "an instruction that the tokenizer cuts",
        with_values(TASKS, "task", every(lambda _: LONG)),
        (LONG, "tokens", "24", "cut"),
    ),
)
"""Of a second dataset beside a sound one."""

LABELS: tuple[tuple[str, str | bytes | None, tuple[str, ...]], ...] = (
    ("no such file of labels", None, ("cannot be read",)),
    ("labels that are not JSON", "true, false", ("cannot be read",)),
    ("binary labels", b"\xff\xfe\x00", ("cannot be read",)),
    ("labels that are numbers", "[1, 0]", ("true and false",)),
    ("labels by name", '{"0": true}', ("true and false",)),
    ("too few labels", json.dumps([True, False]), ("2 labels", "120 episodes")),
)


def _spoiled(change: Change, place: Place) -> Command:
    root = place.dataset()
    change(root)
    return pi0(place, f"--dataset.root={root}")


def _second(change: Change, place: Place) -> Command:
    root = place.dataset()
    change(root)
    return pi0(place, f"--dataset.more=[{{repo_id: local/y, root: {root}, episodes: [0, 1]}}]")


def _nobody_took_over(place: Place) -> Command:
    root = place.dataset()
    _as_column("intervention")(root)
    return pi0(place, f"--dataset.root={root}", "--dataset.intervention_weight=3")


def _pictures(change: Change, place: Place) -> Command:
    root = place.image_dataset()
    change(root)
    return pi0(place, f"--dataset.root={root}", "--policy.n_action_steps=8")


def _labels(content: str | bytes | None, place: Place) -> Command:
    path = place / "labels.json" if content is None else place.write("labels.json", content)
    return pi0(place, f"--dataset.success_labels={path}")


def _no_success(place: Place) -> Command:
    root = place.dataset()
    undeclared("next.success")(root)
    return pi0(place, f"--dataset.root={root}", "--dataset.reward=success")


def _nothing_to_tell(place: Place) -> Command:
    root = place.dataset()
    with_values(DATA, "next.reward", every(lambda _: 0.0))(root)
    return pi0(place, f"--dataset.root={root}", "--dataset.kind=column")


def _two_names(place: Place) -> Command:
    root = place.dataset()

    def another(info: Any) -> None:
        info["features"]["observation.images.wrist"] = info["features"][CAMERA]

    edit_json(root / INFO, another)
    renamed = f"--rename_map={{observation.images.wrist: {CAMERA}}}"
    return pi0(place, f"--dataset.root={root}", renamed)


def _file_for_folder(place: Place) -> Command:
    return pi0(place, f"--dataset.root={place.write('dataset', 'no folder')}")


ROWS = (
    *(
        Row("dataset", wrong, partial(_spoiled, change), words)
        for wrong, change, words in (*DECLARATION, *META, *FRAMES)
    ),
    *(
        Row("dataset", f"a second one: {wrong}", partial(_second, change), words)
        for wrong, change, words in SECOND
    ),
    Row(
        "dataset",
        "interventions that are false everywhere",
        _nobody_took_over,
        ("--dataset.intervention_weight", "intervention", "false in every row"),
    ),
    *(
        Row("dataset", wrong, partial(_pictures, change), words)
        for wrong, change, words in PICTURES
    ),
    *(
        Row("dataset", wrong, partial(_labels, content), ("--dataset.success_labels", *words))
        for wrong, content, words in LABELS
    ),
    Row("dataset", "success asked for, none labelled", _no_success, ("next.success", "reward")),
    Row("dataset", "all rewards are 0", _nothing_to_tell, ("reward 0", "some episodes succeed")),
    Row("dataset", "two cameras of one name", _two_names, ("--rename_map", "one name")),
    Row("dataset", "a file for a folder", _file_for_folder, ("<dataset>", "meta/info.json")),
)
