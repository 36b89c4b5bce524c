"""Plain distillation by a published implementation: torchdistill's own box, loss, optimizer and schedule, on a CPU.

    python -m benchmarks.peers.torchdistill_loop --networks MODULE:FUNCTION --data DIR --teacher-weights FILE \
        --student-weights FILE --epochs E --out FILE.json

Nothing of torchdistill is changed but the device. Its calls stand in the order of its own example for image classification: the
teacher is asked in every step, images are cropped and flipped one by one with torchvision by a DataLoader, and after each
epoch the student is validated. The protocol is that of Tian et al. (2020) with its milestones scaled to E epochs. Beside it
stand a clock, and a checkpoint an epoch that the clock does not count, with which a killed run goes on.

The networks come from MODULE:FUNCTION, called as f(name, {}, channels=, num_classes=); DIR is what stage `data` of the pipeline
wrote. The student begins with the weights in FILE; where there is none, with those of the seed, which are written there.
`--steps N` times N steps and no more; `--score FILE` gives the top-1 of a student's weights on the test split.
"""
# Shapes: N samples, C channels, H height, W width.

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, RandomSampler, SequentialSampler

from benchmarks.peers.distillation_protocol import (
    BATCH_SIZE,
    GAMMA,
    LABEL_WEIGHT,
    LR,
    MOMENTUM,
    PADDING,
    PUBLISHED_EPOCHS,
    TEMPERATURE,
    WEIGHT_DECAY,
    milestones,
)
from targets.base import read_json, write_json
from targets.errors import TargetError

LOG_EVERY = 100  # steps
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Split(Dataset[tuple[Any, int]]):
    """Images as torchvision's CIFAR10 holds and gives them: bytes (N, H, W, C), an item a transformed PIL image."""

    x_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    transform: Any

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.x_NHWC[index])), int(self.labels_N[index])


def main(argv: Sequence[str]) -> None:
    """Train, time or score, as the arguments say; what came of it is written to --out."""
    arguments = _arguments(argv)
    begun_s = arguments.begun_s or time.time()
    info = read_json(arguments.data / "data.json")
    student = _student(arguments, info)
    found: dict[str, Any]
    if arguments.score is not None:
        found = {"top1_test": _test_top1(student, arguments, info)}
    else:
        box = _box(_network(arguments, arguments.teacher, info), student, arguments, info)
        if arguments.steps is not None:
            found = {"step_s": time_steps(box, arguments.steps)}
        else:
            found = distil(box, arguments.epochs, arguments.out.with_suffix(".checkpoint"), begun_s)
            save_file(box.student_model.state_dict(), arguments.out.with_suffix(".safetensors"))
    write_json(arguments.out, {**found, **_facts(arguments)})


def distil(box: Any, num_epochs: int, checkpoint: Path, begun_s: float) -> dict[str, Any]:
    """All epochs, or those that a killed run left; `before_s` is all that came before the first. Seconds on the wall."""
    done: dict[str, Any] = _restored(box, checkpoint) or {"before_s": time.time() - begun_s, "epochs": []}
    for epoch in range(len(done["epochs"]), num_epochs):
        started_s = time.perf_counter()
        box.pre_epoch_process(epoch=epoch)
        losses = [loss for loss, _ in _steps(box, f"Epoch: [{epoch}]")]
        train_s = time.perf_counter() - started_s
        top1 = accuracy(box.student_model, box.val_data_loader)
        box.post_epoch_process()
        seconds = time.perf_counter() - started_s
        told = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "validation_top1": top1}
        speed = {"images_per_s": len(box.train_data_loader.dataset) / train_s, "train_s": train_s, "seconds": seconds}
        done["epochs"].append({**told, **speed})
        print(f"epoch {epoch + 1} of {num_epochs}: {told} {speed}", file=sys.stderr, flush=True)
        _save(box, done, checkpoint)
    return done


def time_steps(box: Any, num_steps: int) -> list[float]:
    """Seconds of each of the first steps of an epoch, the time that its batch took to come among them."""
    box.pre_epoch_process(epoch=0)
    seconds, last_s = [], time.perf_counter()
    for _, now_s in _steps(box, "Timed:"):
        seconds.append(now_s - last_s)
        last_s = now_s
        if len(seconds) == num_steps:
            break
    return seconds


def _steps(box: Any, header: str) -> Iterator[tuple[float, float]]:
    """Loss and clock after each step of an epoch, with the meters that the published loop keeps."""
    from torchdistill.misc.log import MetricLogger, SmoothedValue  # type: ignore[import-untyped]

    meters = MetricLogger(delimiter="  ")
    meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    for x_NCHW, labels_N, extra in meters.log_every(box.train_data_loader, LOG_EVERY, header):
        loss = box.forward_process(x_NCHW.to(CPU), labels_N.to(CPU), extra)
        box.post_forward_process(loss=loss)
        value = float(loss.item())
        meters.update(loss=value, lr=box.optimizer.param_groups[0]["lr"])
        if not np.isfinite(value):
            raise ValueError(f"the loss is {value}")
        yield value, time.perf_counter()


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Any) -> float:
    """Top-1, a fraction, in evaluation mode; the next epoch of the box sets the training mode again."""
    model.eval()
    return sum(int((model(x_NCHW).argmax(1) == labels_N).sum()) for x_NCHW, labels_N in batches) / len(batches.dataset)


def train_config(num_epochs: int, num_workers: int) -> dict[str, Any]:
    """What torchdistill's YAML files say, as the dictionary that they are read into. Its alpha is the weight of the labels."""
    of_loader = {"batch_size": BATCH_SIZE, "num_workers": num_workers, "drop_last": False}
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    kd = {"temperature": TEMPERATURE, "alpha": LABEL_WEIGHT, "reduction": "batchmean", **logits}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    rate = {"milestones": milestones(num_epochs), "gamma": GAMMA}
    return {
        "num_epochs": num_epochs,
        "train_data_loader": _loader("train", RandomSampler, of_loader),
        "val_data_loader": _loader("validation", SequentialSampler, of_loader),
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}},
        "scheduler": {"key": "MultiStepLR", "kwargs": rate},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def _loader(split: str, sampler: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"dataset_id": split, "sampler": {"class_or_func": sampler, "kwargs": {}}, "kwargs": kwargs}


def _box(teacher: nn.Module, student: nn.Module, arguments: argparse.Namespace, info: dict[str, Any]) -> Any:
    if find_spec("torchdistill") is None:
        raise TargetError("torchdistill is not installed. Run: python -m pip install torchdistill.")
    from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-untyped]

    teacher.load_state_dict(load_file(arguments.teacher_weights))
    config = train_config(arguments.epochs, arguments.workers)
    torch.manual_seed(arguments.seed)
    # torchdistill leaves the teacher in the mode that it is given it in; a teacher answers in evaluation mode.
    return get_distillation_box(
        teacher.eval(), student, _splits(arguments.data, info), config, CPU, None, distributed=False, lr_factor=1
    )


def _splits(data_dir: Path, info: dict[str, Any]) -> dict[str, Split]:
    """Training and validation split, the first with the augmentation of all CIFAR recipes."""
    from torchvision import transforms

    x_NCHW = np.load(data_dir / "train_x.npy", mmap_mode="r", allow_pickle=False)
    labels_N = np.load(data_dir / "train_y.npy", allow_pickle=False)
    plain = [transforms.ToTensor(), transforms.Normalize(info["mean"], info["std"])]
    crop = transforms.RandomCrop(info["height"], padding=PADDING)
    augmented = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *plain])
    found = {}
    with np.load(data_dir / "split.npz", allow_pickle=False) as split:
        for name, transform in (("train", augmented), ("validation", transforms.Compose(plain))):
            index_N = split[name]
            x_NHWC = np.ascontiguousarray(x_NCHW[index_N].transpose(0, 2, 3, 1))
            found[name] = Split(x_NHWC, labels_N[index_N], transform)
    return found


def _network(arguments: argparse.Namespace, name: str, info: dict[str, Any]) -> nn.Module:
    module, _, function = arguments.networks.partition(":")
    factory = getattr(importlib.import_module(module), function)
    network: nn.Module = factory(name, {}, channels=info["channels"], num_classes=info["num_classes"])
    return network


def _student(arguments: argparse.Namespace, info: dict[str, Any]) -> nn.Module:
    torch.manual_seed(arguments.seed)
    student = _network(arguments, arguments.student, info)
    weights = arguments.score or arguments.student_weights
    if weights.is_file():
        student.load_state_dict(load_file(weights))
    else:
        save_file(student.state_dict(), weights)
    return student


def _test_top1(student: nn.Module, arguments: argparse.Namespace, info: dict[str, Any]) -> float:
    folder = arguments.data / "evaluation"
    labels_N = torch.from_numpy(np.load(folder / "y.npy", allow_pickle=False))
    mean, std = (torch.tensor(info[key]).view(-1, 1, 1) for key in ("mean", "std"))
    right, first = 0, 0
    with torch.inference_mode():
        for shard in sorted(folder.glob("x-*.npy")):
            for x_NCHW in torch.from_numpy(np.load(shard, allow_pickle=False)).split(500):
                answers_N = student.eval()((x_NCHW.float() / 255 - mean) / std).argmax(1)
                right += int((answers_N == labels_N[first : first + len(x_NCHW)]).sum())
                first += len(x_NCHW)
    return right / first


def _save(box: Any, done: dict[str, Any], checkpoint: Path) -> None:
    state = {part: getattr(box, part).state_dict() for part in ("student_model", "optimizer", "lr_scheduler")}
    partial = checkpoint.with_suffix(".partial")
    torch.save({**state, "random": torch.get_rng_state(), "done": done}, partial)
    partial.replace(checkpoint)


def _restored(box: Any, checkpoint: Path) -> dict[str, Any] | None:
    if not checkpoint.is_file():
        return None
    state = torch.load(checkpoint, weights_only=True)
    for part in ("student_model", "optimizer", "lr_scheduler"):
        getattr(box, part).load_state_dict(state[part])
    torch.set_rng_state(state["random"])
    done: dict[str, Any] = state["done"]
    return done


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the measurement stands on."""
    versions = {name: version(name) for name in ("torchdistill", "torch", "torchvision")}
    protocol = {
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "milestones": milestones(arguments.epochs),
        "epochs": arguments.epochs,
    }
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "workers": arguments.workers,
        "protocol": protocol,
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--data", type=Path, required=True, help="the directory that stage `data` wrote")
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--teacher-weights", type=Path, required=True)
    parser.add_argument("--student-weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=PUBLISHED_EPOCHS)
    parser.add_argument("--steps", type=int, help="time so many steps, and no more")
    parser.add_argument("--score", type=Path, help="a student's weights: their top-1 on the test split, and no more")
    parser.add_argument("--workers", type=int, default=2, help="processes that augment; 0: the loop itself does")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begun-s", type=float, help="when the process was started, seconds of the epoch")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
