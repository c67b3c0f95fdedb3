"""Evaluation: what is measured on tiny models has values that are known without measuring."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastvar_fx
from fastvar_fx.cli import main
from fastvar_fx.errors import ModelError, ScheduleError
from fastvar_fx.models.sampling import CFG
from fastvar_fx.models.var import VAR, build
from fastvar_fx.quality.evaluate import (
    DENSE,
    HELD_OUT,
    Baseline,
    check_metrics,
    evaluate,
    token_bits,
)
from fastvar_fx.quality.subjects import Case, Generation, HeldOut, case, draw_var, read_folder

SIDES = (1, 2, 3, 4)
SCHEDULE = fastvar_fx.Schedule(SIDES, (0.5,))


@pytest.fixture(scope="module")
def model() -> VAR:
    return build("tiny", scales=SIDES, depth=2, width=32, heads=2, vocab_size=64)


def draw(model: VAR, seed: int) -> Generation:
    return draw_var(model, seed, classes=(0, 1))


@pytest.fixture(scope="module")
def subject(model: VAR) -> Case:
    """The held-out images are what the dense model draws from another seed."""
    drawn = draw(model, 99)
    assert drawn.images is not None
    held_out = HeldOut(drawn.images, torch.tensor([0, -1]), drawn.tokens)
    return Case("tiny", model, SCHEDULE, draw, held_out)


# -- bits ---------------------------------------------------------------------------------------


def test_bits_are_those_of_the_pass_with_a_mask(model: VAR) -> None:
    """The loop with its caches, step by step, against all tokens at once."""
    labels = torch.tensor([4, 7])
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(64, (2, side**2), generator=generator) for side in SIDES]
    f_hat = torch.zeros(2, model.vae.z_channels, 4, 4)
    inputs = []
    for step, ids in enumerate(tokens):
        f_hat, average = model.vae.quantize.get_next_autoregressive_input(
            step, len(SIDES), f_hat, ids, SIDES
        )
        inputs.append(average.flatten(2).transpose(1, 2))
    logits = model(labels, torch.cat(inputs[:-1], dim=1))
    nats = F.cross_entropy(logits.mT, torch.cat(tokens, dim=1), reduction="none")
    expected = [
        part.mean(1) / math.log(2) for part in torch.split(nats, [s**2 for s in SIDES], dim=1)
    ]
    found = token_bits(model, tokens, labels)
    torch.testing.assert_close(found, torch.stack(expected, 1).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bits_of_a_pruned_model_differ_at_its_pruned_steps_only(subject: Case) -> None:
    fidelity = Baseline.of(subject, ["bits"], [0]).compare(subject.pruned())
    for step in fidelity.steps[:-1]:
        assert step.bits_pruned == step.bits_dense
    assert fidelity.steps[-1].bits_pruned != fidelity.steps[-1].bits_dense
    score = fidelity.score("bits", HELD_OUT)
    assert score is not None
    assert score.dense is not None
    assert score.difference is not None
    tokens = torch.tensor([float(side**2) for side in SIDES])
    per_step = torch.tensor([step.bits_dense for step in fidelity.steps])
    assert score.dense.mean == pytest.approx(float(per_step @ tokens / tokens.sum()), rel=1e-5)
    assert score.difference.mean == pytest.approx(score.pruned.mean - score.dense.mean)


@pytest.mark.slow
def test_any_number_of_held_out_images_is_scored_image_by_image(model: VAR, subject: Case) -> None:
    """Batches are of two, so that the third held-out image needs one that is filled up."""
    three = draw_var(model, 7, classes=(2, 3, 4))
    assert three.images is not None
    assert three.tokens is not None
    labels = torch.tensor([2, 3, -1])
    held_out = HeldOut(three.images, labels, three.tokens)
    fast = subject.pruned()
    fidelity = Baseline.of(replace(subject, held_out=held_out), ["bits"], [0]).compare(fast)
    score = fidelity.score("bits", HELD_OUT)
    assert score is not None
    tokens = torch.tensor([float(side**2) for side in SIDES], dtype=torch.float64)
    expected = token_bits(fast, three.tokens, labels) @ tokens / tokens.sum()  # type: ignore[arg-type]
    assert score.values == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_bits_of_what_the_dense_model_drew(subject: Case) -> None:
    """They need no held-out images."""
    baseline = Baseline.of(replace(subject, held_out=None), ["bits", "frechet"], [0, 1])
    assert "no held-out images" in baseline.left_out["frechet"]
    score = baseline.compare(subject.pruned()).score("bits", DENSE)
    assert score is not None
    assert score.difference is not None
    assert score.difference.mean > 0, "a divergence"
    assert score.difference.count == 4


# -- the other metrics --------------------------------------------------------------------------


def test_a_model_that_prunes_nothing_is_the_dense_one(subject: Case) -> None:
    dense = fastvar_fx.Schedule(SIDES, ())
    result = evaluate(replace(subject, schedule=dense), seeds=2, repeats=0)
    assert result.speed is None
    assert result.left_out == {}
    scores = {(s.metric, s.against): s for s in result.fidelity.scores}
    assert scores["psnr", DENSE].pruned.mean == math.inf
    assert scores["ssim", DENSE].pruned.mean == pytest.approx(1)
    assert scores["spectrum", DENSE].pruned.mean == 0
    for metric in ("spectrum", "frechet", "bits"):
        difference = scores[metric, HELD_OUT].difference
        assert difference is not None
        assert difference.mean == 0
    assert all(step.agreement == 1 for step in result.fidelity.steps)


@pytest.mark.slow
def test_every_metric_is_measured_by_seed(subject: Case) -> None:
    result = evaluate(subject, seeds=3, repeats=0)
    found = {(s.metric, s.against): s.pruned for s in result.fidelity.scores}
    to_dense = {(m, DENSE) for m in ("psnr", "ssim", "agreement", "spectrum")}
    to_held_out = {(m, HELD_OUT) for m in ("spectrum", "frechet", "bits")}
    assert set(found) == to_dense | to_held_out | {("bits", DENSE)}
    assert {key: value.count for key, value in found.items() if value.count != 3} == {
        ("bits", HELD_OUT): 2,
        ("bits", DENSE): 6,
    }
    assert 0 < found["ssim", DENSE].mean < 1
    steps = result.fidelity.steps
    assert [step.agreement for step in steps[:-1]] == [1, 1, 1]
    assert steps[-1].agreement == pytest.approx(found["agreement", DENSE].mean)
    assert 0 < found["agreement", DENSE].mean < 1


@pytest.mark.slow
def test_other_methods_are_evaluated(subject: Case) -> None:
    baseline = Baseline.of(subject, ["bits"], [0])
    scores = []
    for method in ("fastvar", "tome"):
        score = baseline.compare(subject.pruned(method)).score("bits", HELD_OUT)
        assert score is not None
        scores.append(score.pruned.mean)
    assert scores[0] != scores[1]


def test_a_skipped_step_has_no_tokens_and_no_likelihood(subject: Case) -> None:
    skipping = replace(subject, schedule=fastvar_fx.Schedule(SIDES, (0.5, 1.0)))
    result = evaluate(skipping, metrics=["agreement", "bits"], seeds=1, repeats=1)
    assert "skipped step" in result.left_out["bits"]
    assert result.fidelity.steps[-1].agreement is None
    assert result.fidelity.steps[-2].agreement is not None
    assert result.speed is not None
    assert result.speed.flops_pruned < result.speed.flops_dense
    assert len(result.speed.steps) == 4


def test_the_end_of_guidance_shows_in_the_bits_of_dense_draws_only(subject: Case) -> None:
    """The class-conditional likelihood of held-out images stays that of the pruning alone."""
    ends = replace(subject.schedule, guidance_until=2)
    pruned = Baseline.of(subject, ["bits"], [0]).compare(subject.pruned())
    result = evaluate(replace(subject, schedule=ends), metrics=["bits"], seeds=1, repeats=0)
    assert not result.left_out
    found, want = (each.score("bits", HELD_OUT) for each in (result.fidelity, pruned))
    assert found == want
    found, want = (each.score("bits", DENSE) for each in (result.fidelity, pruned))
    assert found is not None
    assert want is not None
    assert found.dense_values == want.dense_values
    assert found.values != want.values


def test_dense_draws_are_scored_with_the_guidance_of_the_draws(model: VAR, subject: Case) -> None:
    drawn = subject.draw(model, 0)
    assert drawn.tokens is not None
    bits, logits = token_bits(model, drawn.tokens, drawn.labels, cfg=CFG), []  # type: ignore[arg-type]
    hook = model.head.register_forward_hook(lambda *args: logits.append(args[-1]))
    subject.draw(model, 0)
    hook.remove()
    for step, (both, ids) in enumerate(zip(logits, drawn.tokens, strict=True)):
        t = CFG * step / (len(SIDES) - 1)
        one, other = both.chunk(2)
        log_p = ((1 + t) * one - t * other).log_softmax(-1)
        nats = -log_p.gather(2, ids.unsqueeze(2)).mean((1, 2)).double()
        torch.testing.assert_close(bits[:, step], nats / math.log(2), rtol=1e-4, atol=1e-4)


def test_models_without_a_decoder_are_compared_by_their_latents() -> None:
    result = evaluate(case("hart-tiny"), seeds=1, repeats=0)
    assert {score.metric for score in result.fidelity.scores} == {"psnr", "spectrum"}
    assert "no image decoder" in result.left_out["ssim"]
    assert "does not return the tokens" in result.left_out["bits"]


# -- held-out images ---------------------------------------------------------------------------


def write_image(path: Path, width: int = 64, height: int = 64) -> None:
    Image.fromarray(np.full((height, width, 3), 51, dtype=np.uint8)).save(path)


def test_a_folder_of_held_out_images(tmp_path: Path) -> None:
    for name in ("3-lake.png", "no class.png", "12.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = read_folder(tmp_path, 64, 10)
    assert images.shape == (3, 3, 64, 64)
    assert float(images.mean()) == pytest.approx(0.2)
    assert labels.tolist() == [-1, 3, -1]


def test_held_out_images_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        read_folder(tmp_path / "missing", 64, 10)
    with pytest.raises(ModelError, match=r"holds no image; put files \.jpeg"):
        read_folder(tmp_path, 64, 10)
    write_image(tmp_path / "wide.png", width=80)
    with pytest.raises(ModelError, match=r"64 x 64 pixels, but .*wide\.png has 80 x 64; crop"):
        read_folder(tmp_path, 64, 10)
    (tmp_path / "wide.png").unlink()
    write_image(tmp_path / "10-unknown.png")
    with pytest.raises(ModelError, match="class 10; the model has classes 0 to 9"):
        read_folder(tmp_path, 64, 10)
    (tmp_path / "10-unknown.png").write_bytes(b"no image")
    with pytest.raises(ModelError, match="not an image that pillow can read"):
        read_folder(tmp_path, 64, 10)


# -- what was asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [(["psnr", "spectrun"], "'spectrun'; did you mean spectrum?"), ([], "no metric asked for")],
)
def test_unknown_metrics(names: Sequence[str], message: str) -> None:
    with pytest.raises(ModelError) as error:
        check_metrics(names)
    assert message in str(error.value)


def test_cases_that_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'var-tny'; did you mean var-tiny"):
        case("var-tny")
    with pytest.raises(ModelError, match="classes 0 to 999; found 1000"):
        case("var-tiny", classes=[3, 1000])
    with pytest.raises(ModelError, match="hart-tiny has no classes"):
        case("hart-tiny", classes=[3])
    with pytest.raises(ModelError, match="no decoder for images"):
        case("hart-tiny", folder=tmp_path)
    with pytest.raises(ScheduleError, match="demo was trained on maps"):
        case("demo", fastvar_fx.Schedule((1, 2), (0.5,)))


@pytest.mark.slow
def test_the_command_prints_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, subject: Case
) -> None:
    asked: dict[str, object] = {}

    def tiny(name: str, schedule: fastvar_fx.Schedule, **options: object) -> Case:
        asked.update(options, ratios=schedule.ratios)
        return subject

    monkeypatch.setattr("fastvar_fx.cli.evaluate.case", tiny)
    command = ["evaluate", "var-tiny", "--ratios", "0.25", "--metrics", "psnr,bits"]
    options = ["--classes", "0,2", "--seeds", "2", "--repeats", "1"]
    assert main([*command, *options, "--json"]) == 0
    assert asked == {"classes": [0, 2], "folder": None, "held_out": 8, "ratios": (0.25,)}
    data = json.loads(capsys.readouterr().out)
    assert [score["metric"] for score in data["scores"]] == ["psnr", "bits", "bits"]
    assert data["steps"][-1]["bits_pruned"] != data["steps"][-1]["bits_dense"]
    assert data["speed"]["flops_pruned"] < data["speed"]["flops_dense"]
    assert data["method"] == "fastvar"
    assert main([*command, *options, "--method", "drift-corrected"]) == 0
    text = capsys.readouterr().out
    assert "method: drift-corrected" in text
    assert "pruned - dense" in text
    assert "95 % confidence" in text


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--metrics", "fid"]) == 1
    assert "no metric is named 'fid'" in capsys.readouterr().err
    assert main(["evaluate", "var-tiny", "--method", "tomes"]) == 1
    assert "no method is named 'tomes'; did you mean tome?" in capsys.readouterr().err
    assert main(["evaluate", "--classes", "one"]) == 2
    assert "numbers separated by commas" in capsys.readouterr().err


def test_equal_seeds_draw_equal_images(model: VAR) -> None:
    first, again, other = draw(model, 1), draw(model, 1), draw(model, 2)
    assert first.images is not None
    assert again.images is not None
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.latents, other.latents)
    assert first.images.shape == (2, 3, 64, 64)
    plain = model.infer_fhat(2, torch.tensor([0, 1]), g_seed=1, top_k=64, top_p=0.95)
    assert torch.equal(plain, first.latents), "chosen as they are drawn"
