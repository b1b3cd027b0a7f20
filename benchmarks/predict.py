"""What predict makes of two cores, and how long it takes to start: python benchmarks/predict.py

It takes the checkpoint that `segtrain predict` would take. A folder of photos of two megapixels,
with drawn people, is gone through

- by a plain loop with Pillow: load, resize, forward, upsample, save mask and cut-out;
- by a plain loop with the same functions that predict uses, one after the other;
- by `segtrain predict`.

Each in a process of its own, with one and with two threads for torch, in turn. What counts are the
pictures after the first five, so that starting is left out. Then whole processes: `segtrain
predict` on one photo, against `import torch` and one forward pass; the fastest of several.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_PHOTOS, WARM_UP = 100, 5
WIDTH, HEIGHT = 1632, 1224


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=NUM_PHOTOS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child[0]](Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_photos(folder / "photos", options.photos)
        rates = {}
        for child in ("pillow", "ours", "predict"):
            for threads in (1, 2):
                rates[child, threads] = []
        for _ in range(options.repeats):
            for child, threads in rates:
                rates[child, threads].append(images_per_second(child, folder, threads))
        for (child, threads), seen in rates.items():
            rate = statistics.median(seen)
            print(f"{child:8} {threads} torch threads {rate:6.2f} images/s, median of {len(seen)}")
        best = {
            child: max(statistics.median(rates[child, threads]) for threads in (1, 2))
            for child in ("pillow", "ours", "predict")
        }
        print(f"predict / plain loop with Pillow   {best['predict'] / best['pillow']:.2f}")
        print(f"predict / plain loop of its parts  {best['predict'] / best['ours']:.2f}")
        cold = {"torch": [], "forward": [], "one": []}
        for _ in range(2 * options.repeats + 1):
            for child, seen in cold.items():
                started = time.perf_counter()
                output = run_child(child, folder, 1)
                seen.append(float(output) if child == "forward" else time.perf_counter() - started)
        importing, forward, one = (min(seen) for seen in cold.values())
        print(f"cold: import torch {importing:.2f} s, one forward {forward:.2f} s")
        print(f"cold: predict of one photo {one:.2f} s")
        print(f"predict of one photo / both {one / (importing + forward):.2f}")


def draw_photos(folder: Path, num: int) -> None:
    """Drawn people, enlarged, with a camera's noise: as large as files as photos are."""
    import numpy as np

    from segtrain.data.people.scenes import draw_person_scene
    from segtrain.images import resize_image, write_image

    rng = np.random.default_rng(0)
    noise = rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    for number in range(num):
        small = draw_person_scene(0, number % 10, width=408, height=306).image
        large = resize_image(small, (HEIGHT, WIDTH)) + np.roll(noise, 16 * number, axis=1)
        write_image(folder / f"{number:03}.jpg", large.clip(0, 255).astype(np.uint8))


def images_per_second(child: str, folder: Path, threads: int) -> float:
    return float(run_child(child, folder, threads).split()[-1])


def run_child(child: str, folder: Path, threads: int) -> str:
    command = [sys.executable, __file__, "--child", child, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def report(times: list[float]) -> None:
    print((len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP]))


def open_best():
    from segtrain.prediction.network import HowToRun, open_network
    from segtrain.runs import find_checkpoint

    return open_network(find_checkpoint(None)[0], HowToRun())


def model_of_best():
    from segtrain.checkpoint import load_checkpoint, restore_model
    from segtrain.runs import find_checkpoint

    path, _ = find_checkpoint(None)
    checkpoint = load_checkpoint(path)
    return restore_model(checkpoint, path), checkpoint.config.data.image_size


def pillow(folder: Path) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    model, short_side = model_of_best()
    times = []
    target = folder / "pillow"
    target.mkdir(exist_ok=True)
    for path in sorted((folder / "photos").iterdir()):
        image = Image.open(path).convert("RGB")
        scale = short_side / min(image.size)
        seen = image.resize([round(side * scale) for side in image.size], Image.Resampling.BOX)
        with torch.inference_mode():
            batch = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None]
            probs = model(batch).softmax(dim=1)[:, 1:]
            probs = F.interpolate(probs, image.size[::-1], mode="bilinear")
        probability = probs[0, 0].numpy()
        mask = ((probability >= 0.5) * 255).astype(np.uint8)
        Image.fromarray(mask).save(target / f"{path.stem}_mask.png")
        cutout = np.dstack([image, (probability * 255).astype(np.uint8)])
        Image.fromarray(cutout).save(target / f"{path.stem}_cutout.png")
        times.append(time.perf_counter())
    report(times)


def ours(folder: Path) -> None:
    from segtrain.images import read_image, write_image
    from segtrain.prediction.outputs import Result

    network, times = open_best(), []
    for path in sorted((folder / "photos").iterdir()):
        image = read_image(path)
        [probability] = network.probs([image])
        result = Result(image=image, answer=probability)
        write_image(folder / "ours" / f"{path.stem}_mask.png", result.mask)
        write_image(folder / "ours" / f"{path.stem}_cutout.png", result.cutout())
        times.append(time.perf_counter())
    report(times)


def predict(folder: Path) -> None:
    from segtrain import cli
    from segtrain.prediction import command

    times, original = [], command._lines

    def note_the_time(outcome):
        times.append(time.perf_counter())
        return original(outcome)

    command._lines = note_the_time
    photos, target = str(folder / "photos"), str(folder / "predict")
    assert cli.run(["predict", photos, "-o", target, "--overwrite"]) == 0
    report(times)


def import_torch(folder: Path) -> None:
    import torch  # noqa: F401


def forward(folder: Path) -> None:
    from segtrain.images import read_image

    network, photo = open_best(), read_image(folder / "photos" / "000.jpg")
    started = time.perf_counter()
    network.probs([photo])
    print(time.perf_counter() - started)


def one(folder: Path) -> None:
    from segtrain import cli

    photo = str(folder / "photos" / "000.jpg")
    sys.argv = ["segtrain", "predict", photo, "-o", str(folder / "one"), "--overwrite"]
    cli.main()


CHILDREN = {
    "pillow": pillow,
    "ours": ours,
    "predict": predict,
    "torch": import_torch,
    "forward": forward,
    "one": one,
}

if __name__ == "__main__":
    main()
