"""The sweep's checks on real tensors for small networks of many families; `benchmarks/sweep.py` does them all."""

import json

import pytest

from .conftest import ROOT, run_python

SMALL = [  # a network of each of 30 classes
    "test_mambaout",
    "lcnet_035",
    "test_byobnet",
    "test_convnext",
    "test_vit",
    "ghostnet_050",
    "repghostnet_050",
    "test_efficientnet",
    "efficientvit_m0",
    "test_coatnet",
    "starnet_s050",
    "test_vit_relpos",
    "efficientvit_b0",
    "test_resnet",
    "cpubone_nano",
    "regnetx_002",
    "efficientvim_m1",
    "shvit_s1",
    "edgenext_xx_small",
    "test_nfnet",
    "levit_128s",
    "fasternet_t0",
    "cspnext_tiny",
    "rexnet_100",
    "pit_ti_224",
    "deit_tiny_distilled_patch16_224",
    "crossvit_tiny_240",
    "coat_tiny",
    "swin_s3_tiny_224",
    "vgg11",
]


@pytest.mark.benchmark
def test_small_networks_of_30_classes_pass_on_real_tensors(tmp_path):
    files = [*(ROOT / "benchmarks/results").glob("sweep_*.json"), ROOT / "docs/models.md"]
    before = [path.read_bytes() for path in files]
    done = run_python("benchmarks/sweep.py", "--real", "--progress", tmp_path / "real.jsonl", "--models", *SMALL)
    rows = [json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines()]
    assert {row["name"]: row["error"] for row in rows} == dict.fromkeys(SMALL)
    assert len({row["class"] for row in rows}) == 30
    assert "30 of 30 passed" in done.stdout
    assert [path.read_bytes() for path in files] == before


@pytest.mark.benchmark
def test_a_sweep_goes_on_where_it_stopped_and_names_what_fails(tmp_path):
    progress = tmp_path / "meta.jsonl"
    rows = [{"name": "test_resnet", "error": None}, {"name": "test_vit", "error": "TimeoutError: took too long"}]
    progress.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"name": "test_vi')  # cut off
    names = ("test_resnet", "test_vit", "qwen3_vit_88m_enc")
    done = run_python("benchmarks/sweep.py", "--progress", progress, "--models", *names, "--workers", 1, check=False)
    assert done.returncode == 1
    assert f"3 networks, 1 of them done before ({progress})" in done.stdout
    assert "2 of 3 passed" in done.stdout
    rows = {row["name"]: row for row in map(json.loads, progress.read_text().splitlines()[3:])}
    assert "Qwen3VitEncoder has no classifier" in rows["qwen3_vit_88m_enc"]["error"]
    assert rows["test_vit"]["exits"] == ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]
    assert len(rows["test_vit"]["shares"]) == 3


def test_the_checks_notice_what_is_wrong(benchmarks, monkeypatch):
    checks = benchmarks("sweep_checks")
    predict = checks.SelfDistillModel.predict
    monkeypatch.setattr(checks.SelfDistillModel, "predict", lambda model, x, exit: predict(model, x, exit) + 1)
    with pytest.raises(ValueError, match=r"predict\(x, 0\) differs from forward_exits"):
        checks.check_real("test_resnet", {})
    monkeypatch.setattr(checks.SelfDistillLoss, "forward", lambda self, output, target: output.logits[0].sum())
    with pytest.raises(ValueError, match="head parameter 1.* got no gradient"):
        checks.check_meta("test_resnet", {})


def test_the_page_holds_what_the_results_say(benchmarks, monkeypatch, tmp_path):
    sweep_page = benchmarks("sweep_page")
    monkeypatch.setattr(sweep_page, "PAGE", tmp_path / "models.md")
    sweep_page.write_page(ROOT / "benchmarks/results")
    assert (tmp_path / "models.md").read_text() == (ROOT / "docs/models.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/sweep_meta.json").read_text())["rows"]
    assert sum(not row["error"] for row in rows) >= 1362
