"""Building models by name: published sizes, any channels and classes, and what is refused with which words."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.learning.models import build_model, count_macs, count_parameters, save_weights
from pipeline.recipe import ModelConfig
from targets.errors import ModelError, RecipeError

pytestmark = pytest.mark.integration

# millions of parameters, as printed
HE = [("resnet20", "0.27"), ("resnet32", "0.46"), ("resnet44", "0.66"), ("resnet56", "0.85"), ("resnet110", "1.7")]
PUBLISHED = [
    ("wrn_16_1", 10, "0.2"),  # Zagoruyko & Komodakis 2017 (attention transfer)
    ("wrn_16_2", 10, "0.7"),
    ("wrn_40_2", 10, "2.2"),  # Zagoruyko & Komodakis 2016
    ("resnet20", 100, "0.28"),  # the nets of the CRD benchmark, as later papers print them
    ("resnet56", 100, "0.86"),
    ("resnet110", 100, "1.74"),
    ("resnet8x4", 100, "1.23"),
    ("resnet32x4", 100, "7.43"),
    ("wrn_40_2", 100, "2.26"),
    ("wrn_40_1", 100, "0.57"),
    ("wrn_16_2", 100, "0.70"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers: a second thread only waits, and on a busy machine it waits long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build(
    model: str, *, channels: int = 3, size: int = 32, num_classes: int = 10, offline: bool = True, **config
) -> nn.Module:
    return build_model(
        ModelConfig(model=model, **config),
        channels=channels,
        image_size=(size, size),
        num_classes=num_classes,
        allow_code=True,
        offline=offline,
    )


def rounded(num_parameters: int, millions: str) -> str:
    """Millions with as many digits as were printed."""
    return f"{num_parameters / 1e6:.{len(millions.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "num_classes", "millions"), PUBLISHED)
def test_cifar_nets_have_the_published_number_of_parameters(name: str, num_classes: int, millions: str) -> None:
    assert rounded(count_parameters(build(name, num_classes=num_classes)), millions) == millions


@pytest.mark.parametrize(("name", "millions"), HE)
def test_resnets_have_the_parameters_of_he_et_al_but_for_the_projections(name: str, millions: str) -> None:
    model = build(name)

    # Table 6 there is for shortcuts without weights
    projections = sum(count_parameters(module) for path, module in model.named_modules() if path.endswith("downsample"))

    assert projections == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert rounded(count_parameters(model) - projections, millions) == millions


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet8x4", "wrn_10_1", "wrn_16_1"])
@pytest.mark.parametrize(("channels", "size", "num_classes"), [(1, 28, 10), (3, 32, 100), (4, 17, 2)])
def test_cifar_nets_take_any_channels_sizes_and_classes(name: str, channels: int, size: int, num_classes: int) -> None:
    model = build(name, channels=channels, size=size, num_classes=num_classes)

    assert model(torch.randn(2, channels, size, size)).shape == (2, num_classes)


def test_names_of_tensors_are_those_of_the_published_checkpoints() -> None:
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.bias",
        "layer3.0.bn2.weight",
        "fc.bias",
    } <= build("resnet8x4").state_dict().keys()
    assert {
        "conv1.weight",
        "block1.layer.0.bn1.weight",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.1.conv2.weight",
        "bn1.running_mean",
        "fc.weight",
    } <= build("wrn_16_2").state_dict().keys()


def test_widths_make_a_narrower_student() -> None:
    narrow = build("resnet8", args={"widths": [8, 8, 16, 32]})

    assert count_parameters(narrow) < count_parameters(build("resnet8")) / 3
    assert narrow(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("args", [{"widths": [8, 8]}, {"widths": "wide"}, {"widths": [8, 8, 16, 0]}, {"width": 8}])
def test_arguments_that_the_family_does_not_have_are_refused(args: dict) -> None:
    with pytest.raises(ModelError, match="widths"):
        build("resnet8", args=args)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet21", "did you mean 'resnet"),
        ("resnet18", "did you mean 'torchvision:resnet18'"),
        ("wrn_40-2", "did you mean 'wrn_40_2'"),
        ("wrn_17_2", "depth 6n"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("timm:mobilnetv3_small_100", "did you mean 'mobilenetv3_small_100'"),
        ("timm:mobilenetv3_small_100.lamb_in22k", "did you mean 'mobilenetv3_small_100.lamb_in1k'"),
        ("", "unknown"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known_one(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        build(name)

    assert str(refusal.value).count("\n") < 3


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:efficientnet_lite0"])
def test_library_models_take_grey_images_and_the_datas_classes(name: str) -> None:
    model = build(name, channels=1, size=28, num_classes=7)

    assert model.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 7)


def test_a_vision_transformer_takes_the_datas_image_size() -> None:
    model = build("timm:vit_tiny_patch16_224", size=48, num_classes=7)

    assert model.eval()(torch.randn(2, 3, 48, 48)).shape == (2, 7)


def test_images_that_a_net_cannot_take_are_refused_before_training() -> None:
    with pytest.raises(ModelError, match="does not take 3x16x16 images"):
        build("torchvision:alexnet", size=16)


def test_arguments_go_to_the_librarys_constructor() -> None:
    assert count_parameters(build("torchvision:mobilenet_v2", args={"width_mult": 0.35})) < 600_000
    with pytest.raises(ModelError, match="no_such_argument"):
        build("torchvision:mobilenet_v2", args={"no_such_argument": 1})


def test_building_is_decided_by_the_callers_seed_alone() -> None:
    torch.manual_seed(3)
    first = build("resnet8").state_dict()
    torch.manual_seed(3)
    second = build("resnet8").state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:mobilenetv3_small_100"])
def test_published_weights_that_are_not_here_are_refused_offline(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)

    with pytest.raises(ModelError, match=f"(?s){tmp_path}.*offline"):
        build(name, pretrained=True, offline=True)


def test_published_weights_reach_a_net_of_other_channels_and_classes(tmp_path: Path, monkeypatch) -> None:
    from torchvision.models import squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    published = squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")

    model = build("torchvision:squeezenet1_1", channels=1, size=64, num_classes=7, pretrained=True)

    grey, rgb = model.features[0].weight, published.features[0].weight
    torch.testing.assert_close(grey, rgb.sum(1, keepdim=True))  # a grey image is the same value in all three channels
    assert torch.equal(model.features[3].squeeze.weight, published.features[3].squeeze.weight)
    assert model.classifier[1].weight.shape[0] == 7


def test_timms_published_weights_are_found_offline_where_an_earlier_run_left_them(tmp_path: Path, monkeypatch) -> None:
    name = "timm:mobilenetv3_small_050.lamb_in1k"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache_dir = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (cache_dir / "snapshots" / "abc").mkdir(parents=True)
    (cache_dir / "refs").mkdir()
    (cache_dir / "refs" / "main").write_text("abc")
    published = build(name, size=64, num_classes=1000)
    save_weights(published, cache_dir / "snapshots" / "abc" / "model.safetensors")

    model = build(name, channels=1, size=64, num_classes=7, pretrained=True, offline=True)

    torch.testing.assert_close(model.conv_stem.weight, published.conv_stem.weight.sum(1, keepdim=True))
    assert torch.equal(model.conv_head.weight, published.conv_head.weight)
    assert model.classifier.weight.shape[0] == 7


@pytest.mark.parametrize("name", ["resnet8", "python:anything:at_all"])
def test_pretrained_is_refused_where_nothing_is_published(name: str) -> None:
    with pytest.raises(ModelError, match="pretrained"):
        build(name, pretrained=True)


def test_a_checkpoint_is_loaded_and_stands_before_published_weights(tmp_path: Path) -> None:
    source = build("resnet8")
    save_weights(source, tmp_path / "teacher.safetensors")

    loaded = build("resnet8", checkpoint=tmp_path / "teacher.safetensors", pretrained=True)

    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in source.state_dict().items())


FACTORY = """
from torch import nn
def factory(*, channels, image_size, num_classes, width=4):
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def no_module(**kwargs): return 7
def wrong_head(**kwargs): return nn.Flatten()
def without_arguments(): return nn.Flatten()
"""


@pytest.fixture
def persons_directory(tmp_path: Path, monkeypatch) -> Path:
    """A working directory with a net of its own, and a `targets` package that must not hide ours."""
    (tmp_path / "edgestill_test_nets.py").write_text(FACTORY)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "__init__.py").write_text("raise RuntimeError('the wrong targets')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "edgestill_test_nets", raising=False)
    return tmp_path


def test_a_persons_factory_gets_the_datas_shape_and_its_args(persons_directory: Path) -> None:
    model = build("python:edgestill_test_nets:factory", channels=1, size=9, args={"width": 6})

    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 10)
    assert model[0].out_channels == 6


def test_the_persons_directory_is_looked_at_last(persons_directory: Path) -> None:
    build("python:edgestill_test_nets:factory")

    assert sys.path[-1] == str(persons_directory)
    assert sys.path.count(str(persons_directory)) == 1


def test_code_is_not_imported_without_allow_code(persons_directory: Path) -> None:
    with pytest.raises(RecipeError, match="--allow-code") as refusal:
        build_model(
            ModelConfig(model="python:edgestill_test_nets:factory"), channels=1, image_size=(9, 9), num_classes=10
        )

    assert refusal.value.exit_code == 2
    assert "edgestill_test_nets" not in sys.modules


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("python:edgestill_test_nets", "package.module:factory"),
        ("python:edgestill_test_nets:absent", "no 'absent'"),
        ("python:edgestill_test_nets:no_module", "Return a torch.nn.Module"),
        ("python:edgestill_test_nets:wrong_head", "10 logits are needed"),
        ("python:edgestill_test_nets:without_arguments", "called with channels, image_size, num_classes"),
    ],
)
def test_a_factory_that_does_not_serve_is_refused(persons_directory: Path, reference: str, words: str) -> None:
    with pytest.raises((ModelError, RecipeError), match=words):
        build(reference)


def test_macs_of_resnet18_are_the_published_ones() -> None:
    macs = count_macs(build("torchvision:resnet18", size=224, num_classes=1000), (3, 224, 224))

    assert macs / 1e9 == pytest.approx(1.814, abs=5e-4)  # torchvision's weight card: 1.814 G
