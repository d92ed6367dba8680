"""From a config to plans: devices that are here, plans made once, and the golden tables."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tunekit import hardware, kept, planning
from tunekit.config import Loaded, load
from tunekit.errors import DeviceError, DoesNotFit
from tunekit.memory.levers import Levers
from tunekit.training.run import Processes

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "plans.json").read_text())
GIB = 2**30
T = TypeVar("T")


def config(*overrides: str, name: str = "sd15/lora") -> Loaded:
    return load(name, overrides, stand_in="(pictures)")


def here(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """A GPU that answers."""
    usual = {
        "kind": "cuda",
        "index": 0,
        "torch_device": "cuda:0",
        "title": "NVIDIA GeForce RTX 3060",
        "total_bytes": 12 * GIB,
        "free_bytes": 11 * GIB,
        "supports_bf16": True,
    }
    real, device = hardware.probe, hardware.Device(**{**usual, **facts})
    monkeypatch.setattr(hardware, "probe", lambda name="auto": real("cpu") if name == "cpu" else device)


class Twins(Processes):
    """Two processes that find the same."""

    def gather(self, value: T) -> list[T]:
        return [value, value]

    def decide(self, make: Callable[[], T]) -> T:
        return make()


TINY = ("model.source=tiny", "data.resolution=64")


def test_a_run_is_planned_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    settled, plan = planning.settle(config(*TINY).config)
    assert plan is not None
    assert plan.budget_bytes == 11 * GIB
    assert plan.device == "NVIDIA GeForce RTX 3060"
    assert settled.memory.precision == plan.levers.precision == "bf16"
    assert settled.memory.micro_batch == 4
    assert settled.train.optimizer == "adamw"
    assert Levers.of(settled.memory) == Levers("bf16", micro_batch=4)
    open_keys = [key for key, value in settled.memory.model_dump().items() if value is None]
    assert open_keys == ["class_batch"]
    _, plan = planning.settle(config(*TINY, "memory.budget=3 GiB").config)
    assert plan is not None
    assert plan.budget_bytes == 3 * GIB


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, title="Tesla T4", supports_bf16=False)
    assert planning.settle(config(*TINY).config)[0].memory.precision == "fp16"
    assert planning.settle(config(*TINY, "memory.device=cpu").config)[0].memory.precision == "fp32"
    cards = {name: planning.plan_config(config(*TINY), device=name)[0] for name in ("t4", "rtx-3060", "h100")}
    assert {name: plan.levers.precision for name, plan in cards.items()} == {
        "t4": "fp16",
        "rtx-3060": "bf16",
        "h100": "bf16",
    }


def test_a_card_that_others_use_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "other programs hold 11.9 GiB of 12.0 GiB"
    here(monkeypatch, free_bytes=GIB // 10, note=note)
    with pytest.raises(DoesNotFit) as error:
        planning.settle(config(*TINY).config)
    print(error.value)
    assert f"has 102.4 MiB ({note}): " in str(error.value)
    assert "smallest card that would do" in str(error.value)


def test_batches_are_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    settled, _ = planning.settle(config(*TINY).config, Twins(count=2, local=2))
    assert settled.memory.micro_batch == 2


@pytest.mark.parametrize(
    ("overrides", "what", "card"),
    [
        (("memory.base_precision=nf4",), "nf4 needs bitsandbytes", "radeon-pro-w6800"),
        (("train.optimizer=adamw8bit", "adapter=null"), "adamw8bit needs bitsandbytes", "radeon-pro-w6800"),
        (("memory.base_precision=fp8",), "fp8 needs float8", "apple-m2"),
    ],
)
def test_what_a_card_lacks_is_refused(overrides: tuple[str, ...], what: str, card: str) -> None:
    with pytest.raises(DeviceError, match=f"{what}, which does not run on {hardware.find(card).title}"):
        planning.plan_config(config(*TINY, *overrides), device=card)


def test_what_this_machine_lacks_is_told_with_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("bitsandbytes", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: sd15/lora\n"
        "memory: {device: cpu, precision: fp16, base_precision: nf4}\n"
        "train: {optimizer: adamw8bit, trackers: [tensorboard]}\n"
    )
    found = planning.unmet(load(file, ["data.path=x", "train.batch_size=1"]), processes=2)
    assert [(error.key, error.where) for error in found] == [
        ("memory.precision", f"{file}:2"),
        ("memory.base_precision", f"{file}:2"),
        ("train.optimizer", f"{file}:3"),
        ("train.trackers", f"{file}:3"),
        ("train.batch_size", "command line"),
    ]
    assert "[quant]" in str(found[1])
    assert "[trackers]" in str(found[3])
    monkeypatch.undo()
    assert planning.unmet(load(file, ["data.path=x", "memory.precision=fp32"])) == []


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = planning.unmet(config("memory.device=cuda:7"))
    assert (error.key, error.where) == ("memory.device", "command line")
    assert "is not there" in str(error)
    optimize = load("sd15/optimize", ["model.source=tiny", "memory.device=cuda:7"])
    assert [error.key for error in planning.unmet(optimize)] == ["memory.device"]
    here(monkeypatch, title="AMD Radeon PRO W6800", kind="rocm", supports_bf16=False)
    keys = [error.key for error in planning.unmet(config("memory.base_precision=nf4"))]
    assert "memory.base_precision" in keys


def test_less_than_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """One message: how much is missing, what was tried, what would help most, and which card would do."""
    loaded = config("memory.approximate=never", "memory.offload=false")
    with pytest.raises(DoesNotFit) as error:
        planning.plan_config(loaded, device="rtx-3060", budget="1 GiB")
    text = str(error.value)
    print(text)
    for words in ("are missing", "37 of 37 blocks checkpointed", "what helps most: ", "smallest card that"):
        assert words in text
    assert error.value.exit_code == 2


def test_the_second_plan_is_read_without_torch(tmp_path: Path) -> None:
    planning.plan_config(config(*TINY), device="rtx-3060")
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from tunekit import planning; from tunekit.config import load\n"
        f"loaded = load('sd15/lora', {TINY!r}, stand_in='(pictures)')\n"
        "print(planning.plan_config(loaded, device='rtx-3060')[0].words)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # other tests run beside this one
    print(f"the second plan took {took:.2f} s of processor time")
    assert done.returncode == 0, done.stderr
    assert "nothing checkpointed" in done.stdout
    assert took < 2


def test_a_home_that_cannot_be_written_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kept._complain.cache_clear()
    small = (*TINY, "train.batch_size=1", "preview.prompts=[]")
    assert planning.plan_config(config(*small), device="rtx-3060")[0].fits
    here(monkeypatch)
    assert planning.settle(config(*small).config)[1] is not None
    assert capsys.readouterr().err.count("not kept for the next time") == 1


def test_a_display_takes_its_part_of_a_card() -> None:
    (bare,) = planning.plan_config(config(*TINY), device="rtx-3060")
    (shown,) = planning.plan_config(config(*TINY), device="rtx-3060", display=True)
    assert shown.budget_bytes == bare.budget_bytes - planning.DISPLAY
    assert "1.0 GiB are left to the display" in shown.notes
    (less,) = planning.plan_config(config(*TINY), device="rtx-3060", display=True, budget="4 GiB")
    assert less.budget_bytes == 4 * GIB


def test_little_left_over_is_said_with_the_next_plan() -> None:
    bare = ("memory.approximate=never", "preview.prompts=[]")
    (roomy,) = planning.plan_config(config(*TINY, *bare), device="rtx-3060")
    assert roomy.margin > planning.MARGIN
    assert not [note for note in roomy.notes if "left over" in note]
    budget = f"{roomy.device_bytes * 1.01 / hardware.SHOWN / GIB:.5f} GiB"
    (tight,) = planning.plan_config(config(*TINY, *bare), budget=budget)
    (note,) = [note for note in tight.notes if "left over" in note]
    print(note)
    assert note.startswith("only 1.0% of the memory is left over")


def test_a_card_that_is_not_listed_leads_to_a_budget() -> None:
    with pytest.raises(DeviceError, match=r'--budget "10 GiB"'):
        planning.plan_config(config(*TINY), device="rtx-9999")


def test_without_bitsandbytes_no_plan_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    here(monkeypatch, free_bytes=GIB // 2)
    with pytest.raises(DoesNotFit) as error:
        planning.settle(config(*TINY).config)
    assert "nf4" not in str(error.value).partition("\n")[0]
    assert 'not looked at, need the package "bitsandbytes"' in str(error.value)


def test_a_plan_that_does_not_fit_is_an_error_the_second_time_too() -> None:
    """`--device all` shows it as a row and keeps it; asked for by itself it is refused."""
    loaded = config(*TINY, "memory.gradient_checkpointing=false", "memory.offload=false")
    for _ in range(2):
        assert not planning._known(loaded.config, hardware.find("rtx-3060"), 2**28, print, strict=False).fits
        with pytest.raises(DoesNotFit):
            planning.plan_config(loaded, device="rtx-3060", budget="256 MiB")


def test_a_plan_is_made_anew_when_what_it_follows_from_changes(tmp_path: Path) -> None:
    planning.plan_config(config(*TINY), device="rtx-3060")
    said: list[str] = []
    planning.plan_config(
        config(*TINY, "data.path=elsewhere", "name=other"), device="rtx-3060", say=said.append
    )
    assert said == []
    planning.plan_config(config(*TINY, "adapter.rank=8"), device="rtx-3060", say=said.append)
    assert said


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_plan_follows_from_the_files_of_a_local_model(tiny_source: Path, tmp_path: Path, file: str) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_source, source)
    place = planning._Place("a card", hardware.find("rtx-3060"), None, "bf16")

    def digest() -> str:
        return planning._digest(config(f"model.source={source}").config, place, "rtx-3060", 1)

    before = digest()
    assert before == digest()
    with (source / file).open("ab") as opened:
        opened.write(b" ")
    assert digest() != before


def unlike(plans: dict[str, dict[str, Any]]) -> list[str]:
    """The first card of each plan; many cards have the same."""
    found = {json.dumps(plan, sort_keys=True): card for card, plan in reversed(plans.items())}
    return sorted(found.values())


SHOWN = {"sd15/lora": unlike(GOLDEN["sd15/lora"]), "sdxl/lora": ["rtx-2060-12gb", "rtx-3060", "a100-40gb"]}
"""Cards that show something of a config; of others a small one, and one on which nothing has to be done."""


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_plans(name: str) -> None:
    """The table of the README; scripts/update_docs writes it anew where a plan changed for a reason."""
    cards = SHOWN.get(name, ["rtx-3060"])
    for plan in planning.plan_config(config(name=name), device="all", cards=cards):
        card, known = plan.device, GOLDEN[name][plan.device]
        print(f"{name} on {card}: {plan.words}, {plan.device_bytes / GIB:.1f} GiB")
        assert (plan.fits, plan.levers.precision, plan.measures, plan.peak_phase) == (
            known["fits"],
            known["precision"],
            known["levers"],
            known["peak_phase"],
        )
        assert plan.device_bytes == pytest.approx(known["device_bytes"], rel=1e-3)
        assert plan.ram_bytes == pytest.approx(known["ram_bytes"], rel=1e-3)
        assert plan.relative_step_time == pytest.approx(known["relative_step_time"], abs=2e-3)


@pytest.mark.slow
def test_dreambooth_on_sdxl_fits_where_a_lora_fits() -> None:
    """Its class pictures are drawn in the run's precision, without the text encoders beside them."""
    base = (
        "model.family=sdxl",
        "model.source=stabilityai/stable-diffusion-xl-base-1.0",
        "model.variant=null",
    )
    size = ("data.resolution=1024", "train.batch_size=1", "adapter.targets=[to_q, to_k, to_v, to_out.0]")
    asked = {"device": "all", "cards": ["rtx-3060", "rtx-3090"]}
    plans = planning.plan_config(config(*base, *size, name="sd15/dreambooth"), **asked)
    loras = planning.plan_config(config(name="sdxl/lora"), **asked)
    for plan, lora in zip(plans, loras, strict=True):
        print(f"{plan.device}: {plan.words}, {plan.device_bytes / GIB:.1f} GiB, most in {plan.peak_phase}")
        assert plan.fits and lora.fits
        assert plan.approximates == lora.approximates == []
        assert plan.levers.class_batch in (1, 2, 4)


def test_a_chain_that_heals_is_planned_with_its_teacher() -> None:
    """Student and teacher in float32, the student's gradients and state: predicted, and not arranged."""
    chain = "optimize=[merge, {prune: {ratio: 0.3}}, {heal: {batch_size: 4, micro_batch: 2}}]"
    (bare,) = planning.plan_config(config(*TINY), device="rtx-3060")
    (plan,) = planning.plan_config(config(*TINY, chain), device="rtx-3060")
    assert "heal" not in bare.phases
    ledger = plan.phases["heal"]["ledger"]
    print(ledger)
    assert ledger["teacher"] == pytest.approx(ledger["weights"], rel=0.01)
    assert ledger["optimizer state"] == pytest.approx(2 * ledger["weights"], rel=0.05)
    assert plan.phases["heal"]["host_bytes"] > 2 * ledger["weights"]
    assert "heal" not in planning.plan_config(config(*TINY, chain), device="cpu")[0].phases
    (again,) = planning.plan_config(
        config(*TINY, chain.replace("batch_size: 4", "batch_size: 8")), device="rtx-3060"
    )
    assert again.phases["heal"]["peak_allocated_bytes"] == plan.phases["heal"]["peak_allocated_bytes"]
    (smaller,) = planning.plan_config(
        config(*TINY, chain.replace("micro_batch: 2", "micro_batch: 1")), device="rtx-3060"
    )
    assert smaller.phases["heal"]["peak_allocated_bytes"] < plan.phases["heal"]["peak_allocated_bytes"]
    (adapter,) = planning.plan_config(
        config(*TINY, chain.replace("batch_size", "adapter: {rank: 4}, batch_size")), device="rtx-3060"
    )
    less = adapter.phases["heal"]["ledger"]
    assert less["teacher"] == ledger["teacher"] and less["optimizer state"] < ledger["optimizer state"] / 5
    assert adapter.phases["heal"]["peak_allocated_bytes"] < plan.phases["heal"]["peak_allocated_bytes"]


def test_a_chain_that_distills_is_planned_with_its_teacher() -> None:
    """With an adapter, teacher and student are one network; without, there are two."""
    lora, full = (
        planning.plan_config(
            config(*TINY, f"optimize=[merge, {{distill: {{batch_size: 2, adapter: {adapter}}}}}]"),
            device="rtx-3060",
        )[0].phases["distill"]["ledger"]
        for adapter in ("{rank: 4}", "null")
    )
    print(lora, full)
    assert not lora.get("teacher")
    assert lora["kept by the task"] == pytest.approx(lora["adapter"], rel=0.01)  # the running mean
    assert full["teacher"] == pytest.approx(full["weights"], rel=0.01)
    assert full["kept by the task"] == pytest.approx(full["weights"], rel=0.01)


def test_a_heal_that_does_not_fit_is_refused_before_anything_is_trained() -> None:
    chain = "optimize=[merge, {prune: {ratio: 0.3}}, {heal: {batch_size: 8}}]"
    loaded = config("data.resolution=256", "train.batch_size=1", chain)
    with pytest.raises(DoesNotFit, match=r"in the phase heal") as error:
        planning.plan_config(loaded, device="rtx-3060")
    print(error.value)
    assert "what helps most: " in str(error.value)
