"""Throughput and startup time of predict on two cores: python benchmarks/predict.py

Uses the checkpoint that `segtrain predict` would use. A folder of two-megapixel photos with drawn
people is processed

- by a plain loop with Pillow: load, resize, forward, upsample, save mask and cutout;
- by a plain loop over the functions that predict uses;
- by `segtrain predict`.

Each runs in its own process, with one and with two torch threads, alternating. The first five
images are not counted, which excludes startup. Then whole processes are timed: `segtrain predict`
on one photo, compared with `import torch` plus one forward pass; the fastest of several counts.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        for child in ("pillow", "functions", "predict"):
            for threads in (1, 2):
                rates[child, threads] = []
        for _ in range(options.repeats):
            for child, threads in rates:
                rates[child, threads].append(images_per_second(child, folder, threads))
        for (child, threads), values in rates.items():
            rate = statistics.median(values)
            print(f"{child:9} {threads} threads {rate:6.2f} images/s, median of {len(values)}")
        best = {
            child: max(statistics.median(rates[child, threads]) for threads in (1, 2))
            for child in ("pillow", "functions", "predict")
        }
        print(f"predict / plain loop with Pillow     {best['predict'] / best['pillow']:.2f}")
        print(f"predict / plain loop over functions  {best['predict'] / best['functions']:.2f}")
        cold = {"torch": [], "forward": [], "one_photo": []}
        for _ in range(2 * options.repeats + 1):
            for child, seconds in cold.items():
                started = time.perf_counter()
                output = run_child(child, folder, 1)
                elapsed = time.perf_counter() - started
                seconds.append(float(output) if child == "forward" else elapsed)
        importing, forward, one_photo = (min(seconds) for seconds in cold.values())
        print(f"cold: import torch {importing:.2f} s, one forward {forward:.2f} s")
        print(f"cold: predict of one photo {one_photo:.2f} s")
        print(f"predict of one photo / both {one_photo / (importing + forward):.2f}")


def draw_photos(folder: Path, num: int) -> None:
    """Upsampled drawn people with camera noise, so that the files are as large as photos."""
    import numpy as np

    from segtrain.demo.scenes import draw_person_scene
    from segtrain.imaging.images import resize_image, write_image

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
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout


def print_rate(times: list[float]) -> None:
    print((len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP]))


def load_best_backend():
    from segtrain.inference.load import load_backend
    from segtrain.inference.options import InferenceOptions
    from segtrain.runs.folder import find_checkpoint

    return load_backend(find_checkpoint(None)[0], InferenceOptions())


def load_best_model():
    from segtrain.checkpoint import load_checkpoint, restore_model
    from segtrain.runs.folder import find_checkpoint

    path, _ = find_checkpoint(None)
    checkpoint = load_checkpoint(path)
    return restore_model(checkpoint, path), checkpoint.config.data.image_size


def pillow(folder: Path) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    model, short_side = load_best_model()
    times = []
    target = folder / "pillow"
    target.mkdir(exist_ok=True)
    for path in sorted((folder / "photos").iterdir()):
        image = Image.open(path).convert("RGB")
        scale = short_side / min(image.size)
        small = image.resize([round(side * scale) for side in image.size], Image.Resampling.BOX)
        with torch.inference_mode():
            batch = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
            probs = model(batch).softmax(dim=1)[:, 1:]
            probs = F.interpolate(probs, image.size[::-1], mode="bilinear")
        probability = probs[0, 0].numpy()
        mask = ((probability >= 0.5) * 255).astype(np.uint8)
        Image.fromarray(mask).save(target / f"{path.stem}_mask.png")
        cutout = np.dstack([image, (probability * 255).astype(np.uint8)])
        Image.fromarray(cutout).save(target / f"{path.stem}_cutout.png")
        times.append(time.perf_counter())
    print_rate(times)


def functions(folder: Path) -> None:
    from segtrain.imaging.images import read_image, write_image
    from segtrain.prediction.outputs import Result

    backend, times = load_best_backend(), []
    for path in sorted((folder / "photos").iterdir()):
        image = read_image(path)
        [probability] = backend.probs([image])
        result = Result(image=image, probs=probability)
        write_image(folder / "functions" / f"{path.stem}_mask.png", result.mask)
        write_image(folder / "functions" / f"{path.stem}_cutout.png", result.cutout())
        times.append(time.perf_counter())
    print_rate(times)


def predict(folder: Path) -> None:
    from tqdm import tqdm

    from segtrain.cli import main as cli

    times, original = [], tqdm.update

    def update(bar, n=1):
        times.append(time.perf_counter())
        return original(bar, n)

    tqdm.update = update  # predict updates its progress bar after each image
    photos, target = str(folder / "photos"), str(folder / "predict")
    assert cli.run(["predict", photos, "-o", target, "--overwrite"]) == 0
    print_rate(times)


def import_torch(folder: Path) -> None:
    import torch  # noqa: F401


def forward(folder: Path) -> None:
    from segtrain.imaging.images import read_image

    backend, photo = load_best_backend(), read_image(folder / "photos" / "000.jpg")
    started = time.perf_counter()
    backend.probs([photo])
    print(time.perf_counter() - started)


def one_photo(folder: Path) -> None:
    from segtrain.cli import main as cli

    photo = str(folder / "photos" / "000.jpg")
    sys.argv = ["segtrain", "predict", photo, "-o", str(folder / "one_photo"), "--overwrite"]
    cli.main()


CHILDREN = {
    "pillow": pillow,
    "functions": functions,
    "predict": predict,
    "torch": import_torch,
    "forward": forward,
    "one_photo": one_photo,
}

if __name__ == "__main__":
    main()
