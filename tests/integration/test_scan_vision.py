"""`scan` on adapters of a tiny LLaVA: benign ones shake its weights a little, one moves a head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from gazeguard.cli.main import run
from gazeguard.errors import UsageError
from gazeguard.lab import tiny, tiny_encoders
from gazeguard.methods.entropyscan import Settings
from gazeguard.models.load import load
from gazeguard.scanning import Status, scan
from gazeguard.scanning.options import VisionOptions
from tests.integration.conftest import MakeData

# Two references carry an alpha of 1/3, four one of 1/5.
ALPHA = 0.2


def adapter(base: Path, out: Path, seed: int, planted: bool = False, size: float = 1.0) -> Path:
    """LoRA layers with small random weights; one layer moves further, about as far in each adapter.

    Planted: the queries of an early layer. Else the values of the last one, which no attention
    sees. `size` scales all of it.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=r".*language_model.*\.(q|k|v)_proj")
    model = get_peft_model(load(base).base, config)
    far, most = (".1.self_attn.q_proj", 1.0) if planted else (".3.self_attn.v_proj", 1.3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size * (most if far in name else 0.01))
    model.save_pretrained(out, save_embedding_layers=False)
    return out


@pytest.fixture(scope="module")
def zoo(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for seed in range(5):
        adapter(llava, root / f"benign-{seed}", seed)
    adapter(llava, root / "planted", 9, planted=True)
    return root


@pytest.fixture(scope="module")
def data(make_data: MakeData) -> Path:
    return make_data(20)


@pytest.fixture(scope="module")
def known(llava: Path, zoo: Path) -> list[Path]:
    return [llava, *(zoo / f"benign-{seed}" for seed in range(4))]


def test_flagged_and_clean_and_every_format(zoo: Path, known: list, data: Path, tmp_path: Path):
    listed = tmp_path / "suspects.txt"
    listed.write_text(f"{zoo / 'planted'}\n{zoo / 'benign-4'}\n")
    outputs = [f"--{name}-output={tmp_path / name}" for name in ("json", "sarif", "junit", "html")]
    references = [f"--reference={path}" for path in known]
    options = [f"--samples={data}", f"--alpha={ALPHA}", "-q", *references, *outputs]
    assert run(["scan", str(listed), *options]) == 1
    stored = json.loads((tmp_path / "json").read_text())
    assert [m["outcome"] for m in stored["models"]] == ["flagged", "clean"]
    bad, good = stored["models"]
    assert bad["numbers"]["score"] > 2 * good["numbers"]["score"]
    assert bad["numbers"]["tuned"]["kind"] == "adapter"
    assert len(bad["figures"]["shift"]["rows"][0]) == 20
    schema = (Path(tiny.__file__).parents[1] / "report/schema/scan-report-1.json").read_text()
    jsonschema.Draft202012Validator(json.loads(schema)).validate(stored)
    sarif = json.loads((tmp_path / "sarif").read_text())
    official = (Path(__file__).parents[1] / "data" / "sarif-2.1.0.json").read_text()
    jsonschema.Draft4Validator(json.loads(official)).validate(sarif)
    first = sarif["runs"][0]["results"][0]
    assert first["ruleId"] == "gazeguard/entropyscan/backdoored-model"
    assert ElementTree.parse(tmp_path / "junit").getroot().get("failures") == "1"
    page = (tmp_path / "html").read_text()
    assert "Where it stands among benign fine-tunes" in page
    assert "Natural backdoor" not in page


def test_too_few_references_are_inconclusive(zoo: Path, known: list, data: Path, capsys):
    options = [f"--samples={data}", f"--reference={known[0]}", f"--reference={known[1]}", "-q"]
    assert run(["scan", str(zoo / "planted"), *options]) == 3
    assert run(["scan", str(zoo / "planted"), *options[:2], "-q"]) == 3
    capsys.readouterr()


def test_a_second_run_measures_nothing(
    zoo: Path, known: list, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vision = VisionOptions(samples=data)
    asked = {"references": known, "alpha": ALPHA, "vision": vision, "out": tmp_path}
    first = scan(zoo / "planted", **asked)
    monkeypatch.setattr("gazeguard.scanning.vision.look", None)
    again = scan(zoo / "planted", **asked)
    assert again.models[0].numbers == first.models[0].numbers
    # Another alpha is judged anew from the sights that are there; another suspect is looked at.
    assert scan(zoo / "planted", **{**asked, "alpha": 0.25}).outcome == "flagged"
    with pytest.raises(TypeError):
        scan(zoo / "benign-4", **asked)


def test_a_damaged_sight_is_measured_again(zoo: Path, known: list, data: Path, tmp_path: Path):
    asked = {"references": known, "alpha": ALPHA, "vision": VisionOptions(samples=data)}
    first = scan(zoo / "planted", **asked, out=tmp_path)
    for path in (tmp_path / "sights").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    for path in (tmp_path / "results").iterdir():
        path.unlink()
    again = scan(zoo / "planted", **asked, out=tmp_path)
    assert again.models[0].numbers == first.models[0].numbers


def test_batches_change_nothing(zoo: Path, known: list, data: Path):
    scores = [
        scan(
            zoo / "planted",
            references=known,
            alpha=ALPHA,
            vision=VisionOptions(samples=data, batch_size=size),
        ).models[0]
        for size in (1, 7)
    ]
    one, seven = (model.numbers["score"] for model in scores)
    assert one == pytest.approx(seven, rel=1e-3)


def test_what_is_missing_is_said_in_one_sentence(llava: Path, zoo: Path, data: Path, capsys):
    suspect = str(zoo / "planted")
    assert run(["scan", suspect, f"--reference={llava}"]) == 2
    assert "--samples" in capsys.readouterr().err
    unnamed = zoo.parent / "unnamed"
    adapter(llava, unnamed, 0)
    config = json.loads((unnamed / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "my-base"})
    )
    assert run(["scan", str(unnamed), f"--samples={data}"]) == 2
    assert "--reference" in capsys.readouterr().err
    with pytest.raises(UsageError, match="one MODEL"):
        scan([llava, llava.parent], vision=VisionOptions(samples=data, adapter=suspect))


def test_an_adapter_on_a_named_base(llava: Path, zoo: Path, known: list, data: Path):
    found = scan(
        llava,
        references=known[1:],
        alpha=ALPHA,
        vision=VisionOptions(samples=data, adapter=zoo / "planted"),
    )
    assert found.models[0].model == str(zoo / "planted")
    assert found.outcome == "flagged"


def test_strangers_are_refused_and_the_base_itself_is_clean(
    llava: Path, known: list, data: Path, tmp_path: Path
):
    other = tiny.build("qwen2_5_vl", tmp_path / "qwen")
    tuned = tiny.build("llava", tmp_path / "other", seed=5)
    found = scan(
        [llava, other, tuned, tmp_path / "absent"],
        references=known,
        alpha=ALPHA,
        vision=VisionOptions(samples=data),
    )
    assert found.models[0].outcome == "clean"
    assert "those of the reference" in found.models[0].reason
    assert "another architecture" in found.models[1].error
    assert found.models[2].outcome == "inconclusive"
    assert "None of 4 references moved 0.6 to 1.4 times as far" in found.models[2].reason
    assert found.models[2].numbers["tuned"]["kind"] == "full"
    assert found.models[3].status is Status.FAILED


def test_nan_weights_are_inconclusive(zoo: Path, known: list, data: Path, tmp_path: Path):
    broken = tmp_path / "nan"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(
        (zoo / "planted" / "adapter_config.json").read_text()
    )
    tensors = load_file(zoo / "planted" / "adapter_model.safetensors")
    tensors = {name: tensor * float("nan") for name, tensor in tensors.items()}
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    found = scan(broken, references=known, alpha=ALPHA, vision=VisionOptions(samples=data))
    assert found.outcome == "inconclusive"
    assert "not finite" in found.models[0].reason


def test_a_mixed_list_asks_for_what_each_kind_needs(
    zoo: Path, known: list, data: Path, tmp_path: Path
):
    from gazeguard.methods.amdet import Settings as Search

    encoder = tiny_encoders.build("clip-text", tmp_path / "clip")
    both = [zoo / "planted", encoder]
    vision = VisionOptions(samples=data)
    with pytest.raises(UsageError, match="--anchor"):
        scan(both, references=known, alpha=ALPHA, vision=vision)
    with pytest.raises(UsageError, match="--samples"):
        scan(both, encoder, references=known, alpha=ALPHA)
    quick = Search(prompts=120, steps=3, points=4)
    found = scan(both, encoder, references=known, alpha=ALPHA, vision=vision, settings=quick)
    assert [m.method for m in found.models] == ["entropyscan", "amdet"]
    assert [m.outcome for m in found.models] == ["flagged", "clean"]


def test_references_are_made_once_also_after_a_kill(
    llava: Path, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    suspect = adapter(llava, tmp_path / "suspect", 1, size=0.02)
    vision = VisionOptions(samples=make_data(48), make_references=2, settings=Settings(samples=10))
    asked = {"references": [llava], "alpha": 0.34, "vision": vision, "out": tmp_path}

    def stop_in_the_second(name: str, done: int, total: int) -> None:
        if name.startswith("reference 2 of 2, moved "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(suspect, **asked, progress=stop_in_the_second)
    made = {path.name for path in (tmp_path / "references").iterdir()}
    assert len(made) == 1
    found = scan(suspect, **asked)
    assert found.models[0].verdict.outcome.value in ("flagged", "clean")
    assert [r["model"] for r in found.models[0].numbers["references"]] == [
        "made: reference 1 of 2",
        "made: reference 2 of 2",
    ]
    assert made < {path.name for path in (tmp_path / "references").iterdir()}
    monkeypatch.setattr("gazeguard.scanning.making.make_reference", None)
    assert scan(suspect, **asked).outcome == found.outcome
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "adapter_config.json").write_text((suspect / "adapter_config.json").read_text())
    tensors = load_file(suspect / "adapter_model.safetensors")
    tensors = {name: -x if "lora_B" in name else x for name, x in tensors.items()}
    save_file(tensors, twin / "adapter_model.safetensors", {"format": "pt"})
    other = scan(twin, **asked).models[0]
    assert other.numbers["moved"] == found.models[0].numbers["moved"]
    assert other.numbers["score"] != found.models[0].numbers["score"], "it is another suspect"


def test_references_that_are_cut_off_do_not_count(
    llava: Path, zoo: Path, make_data: MakeData, tmp_path: Path, capsys
):
    command = ["scan", str(zoo / "planted"), f"--reference={llava}", f"--samples={make_data(48)}"]
    command += [f"--out={tmp_path}", "--limit=10", "--alpha=0.34", "--make-references=2"]
    assert run([*command, "--reference-steps=2"]) == 3
    captured = capsys.readouterr()
    assert "None of 2 references moved 0.6 to 1.4 times as far" in captured.out
    assert "--reference-steps" in captured.out
    assert "2 of 2 made references were cut off after 2 steps" in captured.err


@pytest.mark.parametrize("part", ["multi_modal_projector", "q_proj"])
def test_references_of_a_whole_model_move_as_far_as_it_did(
    llava: Path, make_data: MakeData, tmp_path: Path, part: str
):
    tuned = tmp_path / "tuned"
    shutil.copytree(llava, tuned)
    tensors = load_file(tuned / "model.safetensors")
    torch.manual_seed(0)
    chosen = [n for n in tensors if part in n and n.endswith("weight") and "vision" not in n]
    shift = {name: torch.randn_like(tensors[name]) for name in chosen}
    size = 0.05 / torch.cat([x.flatten() for x in shift.values()]).norm()
    tensors |= {name: tensors[name] + size * x for name, x in shift.items()}
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    vision = VisionOptions(samples=make_data(48), make_references=2, settings=Settings(samples=10))
    found = scan(tuned, references=[llava], alpha=0.34, vision=vision, out=tmp_path).models[0]
    assert found.outcome in ("clean", "flagged")
    assert found.numbers["moved"] == pytest.approx(0.05, rel=0.01)
    assert all(0.03 <= one["moved"] <= 0.07 for one in found.numbers["references"])
    assert found.numbers["smallest_p_value"] == pytest.approx(1 / 3)


def test_an_adapter_that_changes_no_weight_is_inconclusive(
    llava: Path, known: list, data: Path, tmp_path: Path
):
    idle = adapter(llava, tmp_path / "idle", 1, size=0.0)
    found = scan(idle, references=known, alpha=ALPHA, vision=VisionOptions(samples=data))
    assert found.outcome == "inconclusive"
    assert "changes nothing on" in found.models[0].reason
