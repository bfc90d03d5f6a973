"""Writes small archives in the layouts that data sets were published in."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import scipy.io
from PIL import Image


def images(count, height=6, width=6, channels=3, seed=0):
    """Random uint8 images of shape (count, height, width, channels)."""
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def jpeg(image, **options):
    """An image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def opened(blob):
    """What Pillow reads of an encoded image, in RGB."""
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))


def idx(folder, parts, packed):
    """Writes images (count, height, width) and labels, by part, as the files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in parts.items():
        stem = {"train": "train", "test": "t10k"}[name]
        for kind, array in zip(("images", "labels"), arrays, strict=True):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            file = folder / f"{stem}-{kind}-idx{array.ndim}-ubyte"
            if packed:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)


def tar(path, files, mode="w"):
    """Writes a tar file of contents by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, mode))


def tar_bytes(files, mode="w"):
    """The bytes of a tar file of contents by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar_planes(pictures):
    """Images (count, 32, 32, 3) as rows of 3072 bytes: red, then green, then blue."""
    return np.stack([np.concatenate([p[..., c].ravel() for c in range(3)]) for p in pictures])


def cifar10(path, train, test, layout):
    """Writes five batches and a test batch."""
    fifths = zip(*(np.array_split(x, 5) for x in train), strict=True)
    batches = {f"data_batch_{i}": rows for i, rows in enumerate(fifths, start=1)}
    batches["test_batch"] = test
    files = {}
    for name, (pictures, labels) in batches.items():
        rows = cifar_planes(pictures)
        if layout == "binary":
            content = np.concatenate([labels[:, None].astype(np.uint8), rows], 1).tobytes()
            files[f"cifar-10-batches-bin/{name}.bin"] = content
        else:
            batch = {b"data": rows, b"labels": labels.tolist(), b"batch_label": name.encode()}
            files[f"cifar-10-batches-py/{name}"] = _as_python_2(batch)
    tar(path, {**files, "cifar/readme.html": b"<html>"}, "w:gz")


def cifar100(path, train, test, layout):
    """Writes one batch of training images and one of test images; coarse labels are all 7."""
    files = {}
    for name, (pictures, labels) in {"train": train, "test": test}.items():
        rows = cifar_planes(pictures)
        if layout == "binary":
            both = np.stack([np.full_like(labels, 7), labels], 1).astype(np.uint8)
            files[f"cifar-100-binary/{name}.bin"] = np.concatenate([both, rows], 1).tobytes()
        else:
            coarse = [7] * len(labels)
            batch = {b"data": rows, b"fine_labels": labels.tolist(), b"coarse_labels": coarse}
            files[f"cifar-100-python/{name}"] = _as_python_2(batch)
    tar(path, files, "w:gz")


def _as_python_2(batch):
    """A pickle whose arrays bear the module's name of old."""
    content = pickle.dumps(batch, protocol=2)
    return content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def tiny_imagenet(manual, classes, zipped):
    """Writes Tiny-ImageNet: of each class its JPEGs for training, and those of "val".

    Args:
        manual: Where the zip file or the folder comes to lie.
        classes: Pairs of lists of encoded images by WordNet name.
        zipped: A zip file or a folder.
    """
    top, files, annotations = "tiny-imagenet-200", {}, []
    files["wnids.txt"] = "\n".join(sorted(classes, reverse=True)).encode()
    for name, (train, val) in classes.items():
        files[f"train/{name}/{name}_boxes.txt"] = b"0 0 1 1"
        for index, blob in enumerate(train):
            files[f"train/{name}/images/{name}_{index}.JPEG"] = blob
        for blob in val:
            file = f"val_{len(annotations)}.JPEG"
            files[f"val/images/{file}"] = blob
            annotations.append(f"{file}\t{name}\t0\t0\t62\t63\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    files["test/images/test_0.JPEG"] = b"secret"
    manual.mkdir(parents=True)
    if zipped:
        with zipfile.ZipFile(manual / f"{top}.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"{top}/{name}", content)
        return
    for name, content in files.items():
        path = manual / top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def imagenet(manual, train, val):
    """Writes ImageNet: a tar of a tar for each class, a tar of test photos, and the devkit.

    Args:
        manual: Where the three files come to lie.
        train: Lists of encoded images by WordNet name. In the devkit the classes are numbered in
            their order here.
        val: Pairs of an encoded image and its class's WordNet name.
    """
    classes = {
        f"{name}.tar": tar_bytes({f"{name}_{i}.JPEG": blob for i, blob in enumerate(blobs)})
        for name, blobs in train.items()
    }
    tar(manual / "ILSVRC2012_img_train.tar", classes)
    photos = {f"ILSVRC2012_val_{i + 1:08}.JPEG": blob for i, (blob, _) in enumerate(val)}
    # Not in the order of their numbers.
    tar(manual / "ILSVRC2012_img_val.tar", dict(reversed(photos.items())))
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    rows = [(number, name, "words", 0) for number, name in enumerate(train, start=1)]
    rows.append((len(rows) + 1, "n00001740", "entity", len(rows)))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    numbers = list(train)
    truth = "".join(f"{numbers.index(name) + 1}\n" for _, name in val)
    top = "ILSVRC2012_devkit_t12/data"
    content = {
        f"{top}/meta.mat": meta.getvalue(),
        f"{top}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    tar(manual / "ILSVRC2012_devkit_t12.tar.gz", content, "w:gz")
