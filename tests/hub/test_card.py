"""The model card of a saved model."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from timm_selfdistill import SelfDistillModel
from timm_selfdistill.heads import LinearHead

from ..conftest import small_backbone, small_model

EXITS = [
    {"exit": name, "top1": 80.5 + index, "top5": 99.25, "loss": 0.5}
    for index, name in enumerate([0, 1, 2, 3, "ensemble"])
]
METRICS = {
    "epoch": 4,
    "exits": EXITS,
    "hardware": "2 x AMD EPYC",
    "versions": {"timm": "1.0.31", "torch": "2.14.1"},
    "dataset": {
        "name": "zalando/fashion_mnist",
        "type": "zalando/fashion_mnist",
        "hub_id": "zalando/fashion_mnist",
        "config": None,
        "split": "test",
        "images": 1000,
    },
    "settings": {"model": "test_resnet", "epochs": 6, "lr": 0.05},
}


@pytest.fixture
def card(tmp_path) -> ModelCard:
    small_model().save_pretrained(tmp_path, metrics=METRICS)
    return ModelCard.load(tmp_path / "README.md")


def test_its_metadata_is_what_the_hub_reads(card):
    data = card.data.to_dict()
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["timm", "image-classification", "self-distillation", "timm-selfdistill"]
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["zalando/fashion_mnist"]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "test_resnet-self-distilled"
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in results] == [
        ("accuracy", "Top-1 accuracy", 0.835),
        ("top_5_accuracy", "Top-5 accuracy", 0.9925),
        ("accuracy", "Top-1 accuracy, exit 0", 0.805),
        ("top_5_accuracy", "Top-5 accuracy, exit 0", 0.9925),
        ("accuracy", "Top-1 accuracy, exit 1", 0.815),
        ("top_5_accuracy", "Top-5 accuracy, exit 1", 0.9925),
        ("accuracy", "Top-1 accuracy, exit 2", 0.825),
        ("top_5_accuracy", "Top-5 accuracy, exit 2", 0.9925),
        ("accuracy", "Top-1 accuracy, ensemble", 0.845),
        ("top_5_accuracy", "Top-5 accuracy, ensemble", 0.9925),
    ]
    assert {(result.task_type, result.dataset_type, result.dataset_split) for result in results} == {
        ("image-classification", "zalando/fashion_mnist", "test")
    }


def test_its_text_says_how_good_each_exit_is_and_how_to_load_it(card, tmp_path):
    for line in (
        "On 1,000 images of zalando/fashion_mnist (split `test`), 160 x 160 pixels.",
        "| 0 | layer1 | 80.50 | 99.25 | 76.6 M | 74.8% |  |",
        "| 3 | layer4 | 83.50 | 99.25 | 102.5 M | 100.0% |  |",
        "| ensemble | layer4 | 84.50 | 99.25 | 102.9 M | 100.4% |  |",
        "![Accuracy over multiply-adds](exits.png)",
        'model = timm.create_model("hf-hub:user/name", pretrained=True).eval()',
        'model = SelfDistillModel.from_pretrained("user/name")',
        "After epoch 4 of 6. 2 x AMD EPYC.",
        "lr: 0.05",
        "timm 1.0.31, torch 2.14.1",
        "@inproceedings{zhang2019your,",
    ):
        assert line in card.text
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_metrics_has_one_too(tmp_path):
    small_model().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "model-index" not in card.data.to_dict()
    assert "| 0 | layer1 |  |  | 76.6 M | 74.8% |  |" in card.text
    assert "## Training" not in card.text
    assert "exits.png" not in card.text


PAPER = '["Be Your Own Teacher"](https://arxiv.org/abs/1905.08094)'


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"method": "self-distill", "teacher": "deepest"},
            f" by self distillation: the deepest teaches the shallow ones while all learn from the labels ({PAPER}).",
        ),
        (
            {"method": "self-distill", "teacher": "ensemble"},
            f" by self distillation: the mean of all logits teaches them while they learn from the labels ({PAPER},"
            " with the teacher of [arXiv:2104.00299](https://arxiv.org/abs/2104.00299)).",
        ),
        (
            {"method": "self-distill", "teacher": "memory"},
            " by self distillation: the mean of all logits that they gave for an image in earlier epochs teaches them"
            f" while they learn from the labels ({PAPER}, with the memory of"
            " [arXiv:1610.02242](https://arxiv.org/abs/1610.02242)).",
        ),
        (
            {"method": "dsn", "teacher": "deepest"},
            " by deep supervision: from the labels alone ([arXiv:1409.5185](https://arxiv.org/abs/1409.5185)).",
        ),
        (
            {"method": "dks", "teacher": "deepest"},
            " by knowledge synergy: each is taught by every other while all learn from the labels"
            " ([arXiv:1906.00675](https://arxiv.org/abs/1906.00675)).",
        ),
        ({}, "."),
        ({"method": ["dsn"], "teacher": {}}, "."),
    ],
    ids=["deepest", "ensemble", "memory", "dsn", "dks", "unknown", "unknown words"],
)
def test_it_says_how_the_classifiers_were_trained(settings, expected):
    card = small_model().generate_model_card(metrics=METRICS | {"settings": settings})
    assert f"\nclasses, one at each of 4 depths. All classifiers were trained together{expected}\n" in card.text
    frozen = small_model().generate_model_card(metrics=METRICS | {"settings": settings, "frozen": True})
    assert f"network itself is as it was: frozen. Only its shallow classifiers were trained{expected}\n" in frozen.text
    distilled = settings.get("method") not in ("dsn", "dks")
    assert ("self-distillation" in card.data.tags) == ("zhang2019your" in card.text) == distilled
    assert "timm-selfdistill" in card.data.tags
    assert card.data.model_name == ("test_resnet-self-distilled" if distilled else "test_resnet")


def test_it_says_that_there_were_no_labels():
    settings = {"method": "self-distill", "teacher": "deepest", "unlabelled": True}
    card = small_model().generate_model_card(metrics=METRICS | {"settings": settings, "frozen": True})
    assert (
        "Only its shallow classifiers were trained by self distillation: the deepest taught them, without labels ("
        in card.text
    )


def test_names_from_outside_stay_text(tmp_path):
    metrics = METRICS | {"dataset": METRICS["dataset"] | {"name": "a | b\n# {{ card_data }} `c`", "hub_id": None}}
    small_model().save_pretrained(tmp_path, metrics=metrics)
    assert "1,000 images of a \\| b # {{ card_data }} 'c' (split" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}),
    ],
)
def test_the_licence_is_that_of_the_weights_it_began_with(license, expected, tmp_path):
    model = small_model()
    model.backbone.pretrained_cfg["license"] = license
    data = model.generate_model_card().data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    assert model.generate_model_card(license="mit").data.license == "mit"


def test_a_head_of_ones_own_is_asked_for():
    card = small_model(head=LinearHead).generate_model_card()
    assert 'from_pretrained("user/name", head=...)' in card.text


def test_an_edited_card_stays_and_another_is_renewed(tmp_path):
    model, card = small_model(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, metrics=METRICS)
    assert "83.50" in card.read_text()
    card.write_text("mine")
    model.save_pretrained(tmp_path, metrics=METRICS)
    assert card.read_text() == "mine"


def test_metrics_are_in_the_config_and_weights_stay_when_they_change(tmp_path):
    from timm_selfdistill.hub import read_metrics, save_metrics

    small_model().save_pretrained(tmp_path, metrics=METRICS)
    weights = (tmp_path / "model.safetensors").stat()
    record = json.loads((tmp_path / "config.json").read_text())["self_distill"]["metrics"]
    assert record == read_metrics(tmp_path) == METRICS
    picture = (tmp_path / "exits.png").stat()
    save_metrics(tmp_path, METRICS | {"epoch": 5})
    assert (tmp_path / "exits.png").stat() == picture
    assert "](exits.png)" in (tmp_path / "README.md").read_text()
    assert read_metrics(tmp_path)["epoch"] == 5
    assert (tmp_path / "model.safetensors").stat() == weights
    assert SelfDistillModel.from_pretrained(tmp_path).exits == ("layer1", "layer2", "layer3", "layer4")


def test_a_picture_may_be_drawn_later_and_never_shows_another_model(tmp_path):
    from timm_selfdistill.hub import save_metrics

    model, picture, card = small_model(), tmp_path / "exits.png", tmp_path / "README.md"
    metrics = METRICS | {"exits": model.card_rows(METRICS)}
    model.save_pretrained(tmp_path, metrics=metrics)
    first = picture.read_bytes()
    others = metrics | {"exits": [row | {"top1": row["top1"] / 2} for row in metrics["exits"]]}
    model.save_pretrained(tmp_path, metrics=others, picture=False)
    assert not picture.exists()
    assert "exits.png" not in card.read_text()
    save_metrics(tmp_path, others)
    assert picture.read_bytes() != first
    assert "](exits.png)" in card.read_text()
    (tmp_path / "drawn.png").write_bytes(first)
    save_metrics(tmp_path, metrics, tmp_path / "drawn.png")
    assert picture.read_bytes() == first


def test_a_plain_network_has_a_card_too(tmp_path):
    from timm_selfdistill.hub import save_timm_model

    rows = [{"exit": 0, "module": "", "top1": 70.0, "top5": 90.0, "macs": 10**6, "share": 1.0}]
    save_timm_model(small_backbone(), tmp_path, metrics=METRICS | {"exits": rows}, rows=rows)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["timm", "image-classification"]
    assert "SelfDistillModel" not in card.text
    assert "| 0 |  | 70.00 | 90.00 | 1.0 M | 100.0% |  |" in card.text
