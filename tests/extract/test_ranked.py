"""extract-features as one of several processes: the same file, and messages that name the rank."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache.engine
from data_helpers import make_folder
from featcache.cache import part_path, verify
from featcache.config import ExtractConfig, MergeConfig
from featcache.display import say
from featcache.engine import Engine
from featcache.errors import CacheError, UserError
from featcache.extract import extract, extract_part, merge, merge_lines, part_lines
from featcache.extract.request import Request
from rank_runs import fork, wait

Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 train pictures (five blocks) and 100 test pictures (two)."""
    return make_folder(tmp_path_factory.mktemp("set") / "pets", train=150, test=50)


@pytest.fixture(autouse=True)
def red_and_green(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the network by a picture's mean colors, and the launchers' variables by none."""

    def run(pixels: np.ndarray) -> np.ndarray:
        out = np.zeros((len(pixels), 512), np.float32)
        out[:, :3] = pixels.mean(axis=(1, 2))
        return out

    def choose(settings: Any, *args: object, resumed: str | None, **work: object) -> Engine:
        return Engine(
            name="torch",
            precision="float32",
            device="cpu",
            batch_size=8,
            threads=1,
            workers=settings.workers or 1,
            run=run,
            timings={},
            max_error=0.0,
            # As a self-test would that comes out differently on every rank.
            recorded=resumed or f"torch-{os.environ.get('RANK', 'alone')}",
        )

    monkeypatch.setattr(featcache.engine, "choose_engine", choose)
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def settings(folder: Path, tmp_path: Path, **changes: Any) -> ExtractConfig:
    return ExtractConfig(
        dataset=str(folder),
        weights="random",
        backbone="squeezenet1_1",
        image_px=32,
        device="cpu",
        output=changes.pop("output", tmp_path / "x.h5"),
        cache_dir=tmp_path,
        **changes,
    )


def ranks(config: ExtractConfig, size: int, only: set[int] | None = None) -> list[int]:
    """Run the ranks of a job; returns their exit codes. Reports go beside the cache."""

    def one(index: int) -> None:
        os.environ |= {"RANK": str(index), "WORLD_SIZE": str(size), "LOCAL_RANK": str(index)}
        report = extract_part(config)
        assert config.output is not None
        config.output.with_name(f"report{index}.json").write_text(json.dumps(report, default=str))
        for line in part_lines(report):
            say(line)

    return wait([fork(lambda i=i: one(i)) for i in sorted(only or range(size))])


def reports(tmp_path: Path) -> list[Report]:
    return [json.loads(file.read_text()) for file in sorted(tmp_path.glob("report*.json"))]


@pytest.mark.parametrize("write", ["direct", "shards"])
def test_ranks_write_the_file_of_one_process(folder, tmp_path, monkeypatch, capfd, write):
    assert ranks(settings(folder, tmp_path, write=write), 3) == [0, 0, 0]
    said = capfd.readouterr().err
    assert f"rank 0 of 3 (torchrun), --write {write}\n" in said
    found = reports(tmp_path)
    # The one that finished has the command's report, the others a rank's.
    (whole,) = [report for report in found if "num_ranks" in report and "rank" not in report]
    assert whole["num_ranks"] == 3
    computed = sum(s["num_samples"] - s["num_resumed"] for s in whole["splits"].values())
    assert computed + sum(r["num_images"] for r in found if "rank" in r) == 400
    monkeypatch.setenv("RANK", whole["engine"]["recorded"].removeprefix("torch-"))
    alone = extract(settings(folder, tmp_path, output=tmp_path / "one.h5"))
    assert (tmp_path / "x.h5").read_bytes() == Path(alone["cache"]).read_bytes()
    cost = json.loads((tmp_path / "x.h5.json").read_text())
    assert (cost["num_images"], cost["seconds_total"] is None) == (400, write == "shards")
    left = {file.name for file in tmp_path.glob("*x.h5*")}
    assert left == {"x.h5", "x.h5.lock", "x.h5.json"}


def test_one_rank_looks_the_dataset_up_and_the_others_find_it_hashed(folder, tmp_path, monkeypatch):
    log, look_up = tmp_path / "log", Request.of

    def logged(*words: Any) -> Request:
        rank = os.environ["RANK"]
        for event in ("begins", "ends"):
            with log.open("a") as file:
                file.write(f"{event} {rank}\n")
            if event == "begins":
                time.sleep(0.2)
                request = look_up(*words)
        return request

    monkeypatch.setattr(Request, "of", logged)
    assert ranks(settings(folder, tmp_path), 3) == [0, 0, 0]
    first, second, *others = log.read_text().splitlines()
    assert (first[:7], second) == ("begins ", f"ends {first[-1]}")
    assert len(others) == 4


def test_a_rank_without_work_says_so(folder, tmp_path, capfd):
    assert ranks(settings(folder, tmp_path, write="shards"), 9) == [0] * 9
    found = reports(tmp_path)
    idle = [r for r in found if r.get("num_images") == 0]
    assert {4} <= {r["rank"] for r in idle} <= {0, 4}  # 7 blocks in 9 shares
    said = capfd.readouterr().err
    assert " of 9 has no work: no blocks were left for it; " in said
    assert verify(tmp_path / "x.h5").ok
    # The same command once more finds it finished; rank 0 says it for all.
    assert ranks(settings(folder, tmp_path, write="shards"), 2) == [0, 0]
    said = capfd.readouterr().err
    assert said.count("already cached, nothing to do: 300 train, 100 test images") == 1
    assert "rank 1 of 2 has no work: no blocks were left for it; the cache is finished\n" in said


def test_an_unreadable_image_is_named_with_rank_and_block(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pets", train=150, test=50)
    (folder / "train" / "dog" / "140.png").write_bytes(b"not an image")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for write in ("direct", "shards"):
        config = settings(folder, tmp_path, write=write, output=tmp_path / f"{write}.h5")
        said = r"^rank 1 of 2, block train/4: train/dog/140\.png in split train: not an image"
        with pytest.raises(UserError, match=said):
            extract_part(config)
    config = settings(folder, tmp_path, on_error="skip", write="shards")
    assert ranks(config, 2) == [0, 0]
    wanted = settings(folder, tmp_path, on_error="skip", output=tmp_path / "one.h5")
    assert verify(tmp_path / "x.h5").ok
    assert extract(wanted)["splits"]["train"]["num_skipped"] == 1


def test_a_shard_by_hand_and_the_merge(folder, tmp_path, capfd):
    for index in (1, 0):
        report = extract_part(settings(folder, tmp_path, write="shards", shard=f"{index}/3"))
    assert part_lines(report)[0].endswith(
        f"unfinished shards: 2; the last of their ranks merges, or type featcache merge "
        f"{tmp_path / 'x.h5'}"
    )
    with pytest.raises(CacheError, match=r"of 3 shards, 1 are missing or unfinished \(2\)"):
        merge(MergeConfig(cache=tmp_path / "x.h5"))
    # The last one is made, but something ends it before the merge.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("featcache.extract.ranked.merge_if_last", lambda job, lock: lock.release())
        with pytest.raises(CacheError, match=r"no cache .*: its shards are not merged yet; rerun "):
            extract_part(settings(folder, tmp_path, write="shards", shard="2/3"))
    with pytest.raises(UserError, match=r"^/ is no cache's name: give the one that ends in \.h5"):
        MergeConfig(cache=Path("/"))
    done = merge(MergeConfig(cache=tmp_path / "x.h5"))
    assert (done["hit"], done["num_rows"]) == (False, {"train": 300, "test": 100})
    left = tmp_path / "x.h5.shard-00000-of-00003"  # as if it had died before it removed that
    left.write_bytes(b"")
    assert merge(MergeConfig(cache=tmp_path / "x.h5"))["hit"]
    assert not left.exists()
    left.write_bytes(b"")
    assert extract_part(settings(folder, tmp_path, shard="0/3"))["hit"]
    assert not left.exists()
    assert merge_lines({**done, "hit": True}) == [
        f"{tmp_path / 'x.h5'} is finished already: 300 train, 100 test images"
    ]
    assert verify(tmp_path / "x.h5").ok


def test_on_a_network_disk_ranks_write_shards(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("featcache.extract.ranked.shared_disk", lambda folder: "nfs4")
    extract_part(settings(folder, tmp_path, shard="0/2"))
    said = capsys.readouterr().err
    reason = "because nfs4 is a disk of several machines"
    assert f"rank 0 of 2 (--shard), --write shards, {reason}\n" in said
    assert (tmp_path / "x.h5.shard-00000-of-00002").exists()


def test_one_shard_of_a_file_in_place_leaves_the_rest(folder, tmp_path):
    report = extract_part(settings(folder, tmp_path, write="direct", shard="2/3"))
    assert (report["num_images"], report["next"]) == (
        144,
        "4 blocks are left to other ranks, or to the same command once more",
    )
    assert verify(part_path(tmp_path / "x.h5")).num_blocks_done == 3
    assert extract(settings(folder, tmp_path))["splits"]["test"]["num_resumed"] == 100


def test_one_process_finishes_what_shards_began(folder, tmp_path):
    extract_part(settings(folder, tmp_path, write="shards", shard="0/2"))
    report = extract(settings(folder, tmp_path))
    assert report["splits"]["train"]["num_resumed"] == 192
    assert {file.name for file in tmp_path.glob("x.h5*")} == {"x.h5", "x.h5.lock", "x.h5.json"}


@pytest.mark.parametrize("flag", ["force", "update"])
def test_several_ranks_do_not_replace_a_cache(folder, tmp_path, flag):
    with pytest.raises(UserError, match=r"^rank 0 of 2: --force and --update are for one process"):
        extract_part(settings(folder, tmp_path, shard="0/2", **{flag: True}))


def test_a_script_without_srun_works_as_one_process_and_says_so(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert extract_part(settings(folder, tmp_path))["splits"]["train"]["num_samples"] == 300
    assert "srun did not start this command: working as one process" in capsys.readouterr().err


def test_threads_of_ranks_on_one_machine_are_divided(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.extract.ranked.num_cores", lambda: 8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (
        extract_part(settings(folder, tmp_path))["engine"]["workers" if False else "threads"] == 1
    )
    assert json.loads((tmp_path / "x.h5.json").read_text())["config"]["workers"] == 4
