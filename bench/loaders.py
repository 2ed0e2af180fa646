"""Our loader against torch's DataLoader over an image folder, and the writer: same images, same outputs, one run.

    python -m bench.loaders --small FOLDER --large FOLDER

SMALL holds files of 32 x 32 pixels, LARGE photographs as JPEG, both as CLASS/FILE. Before anything is timed the outputs
are compared. Rivals are timed side by side, epoch by epoch, and the ratio is the median over the repeats, so that a
machine that others use as well slows both. Writes bench/results/loaders-DEVICE.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import hflip, pad, resized_crop, to_tensor

from diffult.cli import main
from diffult.engine.device import machine, pick_device
from diffult.engine.memory import status_bytes
from diffult.errors import UserError
from diffult.models.resnet import build_classifier
from diffult.runs.files import write_json
from ffcv_writers import Crop, ImageSet, Loader, Natural, RandomResizedCrop, open_set, write
from ffcv_writers.readers import open_source
from kernels.augment import augment, normalise

WORKERS = (0, 1, 2, 4)
SIZE = 224
NORMALISE = transforms.Normalize([0.5] * 3, [0.5] * 3)
SMALL = transforms.Compose(
    [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE]
)
LARGE = transforms.Compose(
    [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE]
)


def seconds(run: Callable[[], object]) -> float:
    """Of one call, with all that it queued on the device."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def torch_epoch(folder: Path, transform: Callable[..., Any], batch_size: int, workers: int) -> Callable[[], None]:
    """An epoch of DataLoader, its workers running already, batches moved to the device."""
    device, cuda = pick_device(), torch.cuda.is_available()
    loader = DataLoader(
        ImageFolder(str(folder), transform), batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=cuda,
    )  # fmt: skip

    def epoch() -> None:
        for images, labels in loader:
            images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return epoch


def ffcv_epoch(path: Path, batch_size: int, large: bool) -> Callable[[], None]:
    """An epoch of ffcv's own loader, bytes only, on as many threads as there are processors."""
    threads = torch.get_num_threads()
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor

    pipelines = {"image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), ToTensor()]} if large else {}
    cores = len(os.sched_getaffinity(0))
    loader = FfcvLoader(
        str(path), batch_size, num_workers=cores, order=OrderOption.RANDOM, drop_last=False, seed=0, pipelines=pipelines
    )

    torch.set_num_threads(threads)  # ffcv changes them, here and in each epoch

    def epoch() -> None:
        for _ in loader:
            pass
        torch.set_num_threads(threads)

    return epoch


def our_epoch(loader: Loader, ready: Callable[[torch.Tensor, torch.Tensor], object] | None) -> Callable[[], None]:
    """An epoch of ours, made ready to train on by `ready`; None leaves it at bytes on the device."""
    epochs = iter(range(10**6))

    def epoch() -> None:
        for batch in loader.batches(Natural(len(loader.image_set)).epoch(0, next(epochs))):
            if ready is not None:
                ready(batch.images, batch.position)

    return epoch


def best_workers(folder: Path, transform: Callable[..., Any], batch_size: int) -> tuple[int, dict[str, float]]:
    """DataLoader's best number of workers, by one epoch each after a first one that starts them; images/s of all."""
    count = len(ImageFolder(str(folder)))
    rates = {}
    for workers in WORKERS:
        epoch = torch_epoch(folder, transform, batch_size, workers)
        epoch()
        rates[workers] = count / seconds(epoch)
    return max(rates, key=lambda w: rates[w]), {str(w): round(rate, 1) for w, rate in rates.items()}


def race(count: int, rivals: dict[str, Callable[[], None]], base: str, repeats: int) -> dict[str, Any]:
    """Images/s of each, median over the repeats, and its ratio to `base` in the same repeat, median as well."""
    for epoch in rivals.values():
        epoch()
    times = {name: [] for name in rivals}  # type: dict[str, list[float]]
    for _ in range(repeats):
        for name, epoch in rivals.items():
            times[name].append(seconds(epoch))
    return {
        name: {
            "images_per_s": round(count / median(taken), 1),
            f"times_{base}": round(median(b / t for b, t in zip(times[base], taken, strict=True)), 2),
        }
        for name, taken in times.items()
    }


def small_ready(images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return augment(images, 0, positions, size=32, pad=4, flip=True)


def large_ready(images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return augment(images, 0, positions, size=SIZE, flip=True)


def check_small(folder: Path, image_set: ImageSet) -> dict[str, Any]:
    """Largest difference to torchvision, without augmentation over the set, and with it over 32 images: each must be
    one of its 9 x 9 x 2 possible crops."""
    plain = DataLoader(ImageFolder(str(folder), transforms.Compose([transforms.ToTensor(), NORMALISE])), 500)
    ours = Loader(image_set, 500).sequential()
    worst = 0.0
    for (theirs, labels), batch in zip(plain, ours, strict=True):
        worst = max(worst, (normalise(batch.images) - theirs).abs().max().item())
        if not torch.equal(labels, batch.labels.cpu()):
            raise UserError("labels differ")
    batch = next(Loader(image_set, 32).sequential())
    augmented = small_ready(batch.images, batch.position).cpu()
    pictures = ImageFolder(str(folder), lambda image: NORMALISE(to_tensor(pad(image, [4] * 4))))
    for number in range(32):
        windows = pictures[number][0].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        both = torch.cat([windows, hflip(windows)])
        worst = max(worst, (both - augmented[number]).abs().flatten(1).max(1).values.min().item())
    return {"images": len(image_set), "largest_difference": worst, "allowed": 1e-5}


def check_large(folder: Path, image_set: ImageSet, crop: Crop) -> dict[str, Any]:
    """Largest and mean difference in levels of 255 to torchvision's crops at the same boxes."""
    pictures, number = ImageFolder(str(folder)), 0
    worst, total = 0, 0.0
    for batch in Loader(image_set, 50, crop=crop).sequential():
        boxes = crop.boxes(image_set.sizes[batch.sample.cpu().numpy()], batch.position.cpu().numpy())
        for image, box in zip(batch.images.cpu().numpy(), boxes.tolist(), strict=True):
            theirs = np.asarray(resized_crop(pictures[number][0], *box, [SIZE, SIZE]))
            difference = np.abs(image.astype(int) - theirs)
            worst, total, number = max(worst, int(difference.max())), total + difference.mean(), number + 1
    return {"images": number, "largest_difference": worst, "mean_difference": total / number, "allowed": 2}


def checked(result: dict[str, Any]) -> dict[str, Any]:
    if result["largest_difference"] > result["allowed"]:
        raise UserError(f"outputs differ: {result}")
    return result


def compare(
    folder: Path, work: Path, repeats: int, batch_size: int, large: bool, storages: tuple[str, ...]
) -> dict[str, Any]:
    """One set of files: outputs checked, then rivals raced."""
    transform, ready = (LARGE, large_ready) if large else (SMALL, small_ready)
    crop = RandomResizedCrop(SIZE, seed=0) if large else None
    source = open_source("folder", folder).splits["train"]
    count, rivals, checks = len(source.labels), {}, {}
    names = np.arange(count)
    workers, sweep = best_workers(folder, transform, batch_size)
    rivals["torch"] = torch_epoch(folder, transform, batch_size, workers)
    for storage in storages:
        path = work / f"{storage}.beton"
        write(path, source.samples, labels=source.labels, synthetic=0 * names, index=names,
              storage=storage, workers=2)  # type: ignore[arg-type]  # fmt: skip
        image_set = open_set([path], mixed_sizes=large)
        checks[storage] = checked(check_large(folder, image_set, crop) if crop else check_small(folder, image_set))
        loader = Loader(image_set, batch_size, device=pick_device(), crop=crop)
        rivals[f"{storage}, ffcv's loader"] = ffcv_epoch(path, batch_size, large)
        rivals[f"{storage}, bytes on the device"] = our_epoch(loader, None)
        rivals[f"{storage}, ready to train on"] = our_epoch(loader, ready)
    raced = race(count, rivals, "torch", repeats)
    return {"images": count, "batch_size": batch_size, "torch_workers": workers, "torch_images_per_s_by_workers": sweep,
            "outputs": checks, "rates": raced}  # fmt: skip


START = """
import sys, time
import numpy, torch
start = time.perf_counter()
if sys.argv[1] == "ours":
    from ffcv_writers import Loader, open_set
    next(Loader(open_set([sys.argv[2]]), 128).sequential())
else:
    from ffcv.loader import Loader
    next(iter(Loader(sys.argv[2], 128, num_workers=2)))
print(time.perf_counter() - start)
"""


def start_up(path: Path, repeats: int) -> dict[str, Any]:
    """Seconds from an interpreter with torch to the first batch: ours, and ffcv's own loader on the same file."""
    taken: dict[str, list[float]] = {"ours": [], "ffcv": []}
    for _ in range(repeats):
        for name, values in taken.items():
            done = subprocess.run([sys.executable, "-c", START, name, str(path)], capture_output=True, text=True)
            if done.returncode == 0:
                values.append(float(done.stdout.split()[-1]))
    return {name: round(median(values), 2) for name, values in taken.items() if values}


def bound(image_set: ImageSet, steps: int) -> dict[str, Any]:
    """How long a training of ResNet-32 waits: for batches, for their augmentation, for the network; shares of all."""
    device = pick_device()
    model = build_classifier("resnet32", 10, 3, 32).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loader = Loader(image_set, 128, device=device)
    batches = loader.batches(next(Natural(len(image_set)).steps(0, 128, 0, steps + 2)).samples)
    shares = {"loader": 0.0, "augment": 0.0, "network": 0.0}

    def stages() -> Iterator[tuple[str, Callable[[], Any]]]:
        held: list[Any] = []
        yield "loader", lambda: held.append(next(batches))
        batch = held[0]
        yield "augment", lambda: held.append(small_ready(batch.images, batch.position))

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(held[1]), batch.labels).backward()
            optimizer.step()

        yield "network", train

    for step in range(steps + 2):
        for name, stage in stages():
            taken = seconds(stage)
            if step >= 2:
                shares[name] += taken
    whole = sum(shares.values())
    rate = {f"{name}_images_per_s": round(128 * steps / taken, 1) for name, taken in shares.items()}
    return {"steps": steps, "batch_size": 128} | {f"{k}_share": round(v / whole, 5) for k, v in shares.items()} | rate


class Repeated:
    """So many samples out of a few."""

    def __init__(self, samples: Any, count: int) -> None:
        self._samples, self._count = samples, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> Any:
        return self._samples[number % len(self._samples)]


def write_once(folder: Path, kind: str, count: int, out: Path) -> dict[str, float]:
    """In a process of its own: images/s, and by how many MB its memory grew at most."""
    source = open_source("folder", folder).splits["train"]
    names, storage = np.arange(count), "jpg" if kind == "files, jpg" else "raw"
    few: Any = source.samples
    if kind == "arrays":
        number = np.arange(min(2000, len(few)))
        write(out, Repeated(few, len(number)), labels=number, synthetic=0 * number, index=number)
        few = list(open_set([out]).take(number))
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    before = status_bytes("VmHWM")
    taken = seconds(lambda: write(out, Repeated(few, count), labels=0 * names, synthetic=0 * names, index=names,
                                  storage=storage, workers=2))  # type: ignore[arg-type]  # fmt: skip
    return {"images_per_s": round(count / taken), "grown_mb": round((status_bytes("VmHWM") - before) / 2**20, 1)}


def writer(folder: Path, work: Path, repeats: int) -> dict[str, Any]:
    """2,000 images and 10 and 100 times as many: arrays, and JPEG files stored raw or as they are."""
    results: dict[str, Any] = {}
    for kind in ("arrays", "files, raw", "files, jpg"):
        for count in (2_000, 20_000, 200_000) if kind == "arrays" else (2_000, 20_000):
            words = ["--small", folder, "--write-once", f"{kind}:{count}", "--out", work]
            command = [sys.executable, "-m", "bench.loaders", *map(str, words)]
            runs = [
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(repeats if count < 200_000 else 1)
            ]
            results[f"{kind}, {count}"] = {key: median(run[key] for run in runs) for key in runs[0]}
    return results


def command(
    small: Annotated[Path, typer.Option(help="Folder CLASS/FILE of 32 x 32 images.")],
    large: Annotated[Path | None, typer.Option(help="Folder CLASS/FILE of photographs as JPEG.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Epochs that each rival runs.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of ResNet-32.")] = 20,
    note: Annotated[str, typer.Option(help="What else ran on the machine, for the results file.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
    write_once_: Annotated[str | None, typer.Option("--write-once", hidden=True)] = None,
) -> None:
    """Race the loader against torch's DataLoader, check that outputs agree, and time the writer."""
    if write_once_ is not None:
        kind, count = write_once_.split(":")
        print(json.dumps(write_once(small, kind, int(count), out / "written.beton")))
        return
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create"
    )  # more workers than cores: part of the sweep
    typed = f"python -m bench.loaders --small SMALL --large LARGE --repeats {repeats} --steps {steps}"
    result: dict[str, Any] = {"command": typed, "machine": machine(), "cores": len(os.sched_getaffinity(0))}
    result |= {"torch_threads": torch.get_num_threads(), "load_average": os.getloadavg(), "note": note}
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, folder, batch_size in (("small", small, 128), ("large", large, 64)):
            if folder is not None:
                (work / name).mkdir()
                result[name] = compare(folder, work / name, repeats, batch_size, name == "large", ("raw", "jpg"))
                print(json.dumps({name: result[name]}), flush=True)
        one = work / "small" / "raw.beton"
        result["start_up_s"] = start_up(one, min(repeats, 3))
        result["resnet32"] = bound(open_set([one]), steps)
        result["writer"] = writer(small, work, min(repeats, 3))
    file = out / f"loaders-{pick_device().type}.json"
    write_json(file, result)
    print(json.dumps({key: result[key] for key in ("start_up_s", "resnet32", "writer")} | {"results": str(file)}))


if __name__ == "__main__":
    main(command)
