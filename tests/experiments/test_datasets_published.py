"""Published data sets, read from small archives in their published layouts."""

import http.server
import io
import socketserver
import tempfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from experiments.config import ConfigError
from experiments.datasets import augment, mnist, published
from experiments.datasets.photos import Photos
from experiments.datasets.stream import Examples, Stream
from tests.support import archives
from tests.support.meshes import mesh_of


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """Nothing must be left in the folder of temporary files. And there is no network."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(published.urllib.request, "urlopen", _unreachable)
    yield
    assert list(folder.iterdir()) == []


def _unreachable(address, timeout):
    raise OSError("no network")


def _labels(count, classes):
    return np.arange(count) % classes


def _rows(*splits):
    """Images and labels as a sorted list, to compare splits as sets."""
    return sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split[0], split[1], strict=True)
    )


def _check(data, train, test):
    """The test split is as published, and the other two make up the training part."""
    mine = [(split.images, split.labels) for split in (data.train, data.validation)]
    assert _rows(*mine) == _rows(train)
    assert len(data.validation.labels) == len(train[1]) // 10
    np.testing.assert_array_equal(data.test.images, test[0])
    np.testing.assert_array_equal(data.test.labels, test[1])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "idx"])
def test_the_mnist_family_is_read_from_idx_files(tmp_path, name, packed):
    pictures = archives.images(50, 28, 28, 1)
    parts = {
        "train": (pictures[:40, ..., 0], _labels(40, 4)),
        "test": (pictures[40:, ..., 0], _labels(10, 4)),
    }
    folder = published.manual_folder(tmp_path, name)
    archives.idx(folder, parts, packed)
    data = datasets.load(f"idx:{folder}" if name == "idx" else name, tmp_path)
    _check(data, (pictures[:40], _labels(40, 4)), (pictures[40:], _labels(10, 4)))
    assert (data.num_classes, data.image_shape, data.augmentation) == (4, (28, 28, 1), "none")


@pytest.mark.parametrize("layout", ["binary", "python"])
@pytest.mark.parametrize(("name", "stem"), [("cifar10", "cifar-10"), ("cifar100", "cifar-100")])
def test_cifar_is_read_from_both_of_its_archives(tmp_path, name, stem, layout):
    pictures = archives.images(36, 32, 32)
    train, test = (pictures[:30], _labels(30, 3)), (pictures[30:], _labels(6, 3))
    path = published.manual_folder(tmp_path, name) / f"{stem}-{layout}.tar.gz"
    getattr(archives, name)(path, train, test, layout)
    data = datasets.load(name, tmp_path)
    _check(data, train, test)
    assert (data.num_classes, data.augmentation) == (3, "crop-flip")


def test_a_pickle_that_is_no_array_is_not_run(tmp_path):
    evil = b"cos\nsystem\n(S'false'\ntR."
    path = published.manual_folder(tmp_path, "cifar10") / "cifar-10-python.tar.gz"
    archives.tar(path, {"cifar-10-batches-py/test_batch": evil}, "w:gz")
    with pytest.raises(ConfigError, match=r"not as it was published.*os\.system is no array"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_an_archive_cut_short_is_refused(tmp_path, size):
    pictures = archives.images(36, 32, 32)
    path = published.manual_folder(tmp_path, "cifar10") / "cifar-10-binary.tar.gz"
    part = (pictures, _labels(36, 3))
    archives.cifar10(path, part, part, "binary")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"cifar-10-binary.tar.gz is not as it was published"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tiny_imagenet_is_read_from_its_folders(tmp_path, zipped):
    pictures = archives.images(26, 64, 64)
    blobs = [archives.jpeg(picture) for picture in pictures[:25]]
    blobs.append(archives.jpeg(pictures[25, ..., 0]))  # a grey one
    classes = {"n02": (blobs[:10], blobs[20:22]), "n01": (blobs[10:20], blobs[22:])}
    manual = published.manual_folder(tmp_path, "tiny_imagenet")
    archives.tiny_imagenet(manual, classes, zipped)
    decoded = np.stack([archives.opened(blob) for blob in blobs])
    # Classes are numbered in the order of their names.
    labels = np.repeat([1, 0, 1, 0], [10, 10, 2, 4])
    for _ in range(2):  # prepared, then read again
        data = datasets.load("tiny_imagenet", tmp_path)
        _check(data, (decoded[:20], labels[:20]), (decoded[20:], labels[20:]))
    assert (data.num_classes, data.augmentation) == (2, "crop-flip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "tiny_imagenet"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A small ImageNet of plain colours, photos of many sizes: its data set and the colours."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)

    def photo(colour):
        height, width = rng.integers(30, 60, 2)
        plain = np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))
        return archives.jpeg(np.ascontiguousarray(plain), quality=95)

    # Red tells the class, green the photo.
    train = {
        name: [photo((60 * label, 10 * index, 0)) for index in range(14)]
        for label, name in ((2, "n03"), (0, "n01"), (1, "n02"))
    }
    val = [(photo((60 * label, 0, 200)), f"n0{label + 1}") for label in (1, 2, 2, 0, 1)]
    archives.imagenet(published.manual_folder(folder, "imagenet"), train, val)
    return datasets.load("imagenet", folder)


def test_imagenet_is_read_from_its_tars_and_stays_on_disk(imagenet):
    assert (imagenet.num_classes, imagenet.image_shape) == (3, (224, 224, 3))
    np.testing.assert_array_equal(imagenet.train.labels, np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(imagenet.validation.labels, np.repeat([0, 1, 2], 10))
    np.testing.assert_array_equal(imagenet.test.labels, [1, 2, 2, 0, 1])
    for split in (imagenet.train, imagenet.validation, imagenet.test):
        seen = split.images[np.arange(len(split.labels))]
        assert seen.shape == (len(split.labels), 224, 224, 3)
        np.testing.assert_allclose(seen[:, 100, 100, 0], 60 * split.labels, atol=4)
    greens = np.sort(imagenet.train.images[np.arange(4)][:, 0, 0, 1])
    known = np.arange(14) * 10
    assert all(np.min(np.abs(known - int(green))) <= 4 for green in greens)


def test_photos_are_streamed_in_the_order_of_seed_and_epoch_whatever_the_workers(imagenet):
    transform = augment.named("resized-crop-flip", imagenet.image_shape)
    feeds = [
        Stream(imagenet.train, 4, mesh_of(count), transform, imagenet.normalization, 3, workers)
        for count, workers in ((2, 2), (1, 1))
    ]
    batches, again = ([[np.asarray(x) for x in batch] for batch in f.epoch(1)] for f in feeds)
    for ours, theirs in zip(batches, again, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
    order = np.random.default_rng((3, 1)).permutation(12)
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(labels, imagenet.train.labels[order])
    mean, deviation = 255 * np.array([0.485, 0.229])
    for images, labels in batches:
        assert images.shape == (4, 224, 224, 3)
        red = images[..., 0] * deviation + mean
        assert np.max(np.abs(red - 60 * labels[:, None, None])) <= 4


def test_a_box_of_a_photo_is_cut_where_it_was_drawn():
    # Its red is the column, its green the row.
    row, column = np.mgrid[:200, :150].astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([column, row, row], -1)).save(buffer, "PNG")
    photos = Photos([buffer.getvalue()], np.zeros(1, int), size=32)
    split = datasets.Split(photos, np.array([7], np.int32))
    image, label = Examples(split, np.array([0]), np.array([5]), seed=(1, 2))[0]
    rng = np.random.default_rng((1, 2, 5))
    ((top, left, tall, wide),) = augment.random_boxes(rng, 1, 200, 150)
    assert label == 7
    places = (np.arange(32) + 0.5) / 32
    # Away from the edges, where a pixel has neighbours on one side alone.
    np.testing.assert_allclose(image[5, 4:-4, 0], (left + places * wide - 0.5)[4:-4], atol=1)
    np.testing.assert_allclose(image[4:-4, 5, 1], (top + places * tall - 0.5)[4:-4], atol=1)


def test_a_whole_pass_over_photos_fills_its_last_batch_up(imagenet):
    feed = datasets.feed(imagenet, imagenet.test, 4, mesh=mesh_of(1))
    assert isinstance(feed, Stream)
    labels = np.concatenate([np.asarray(labels) for _, labels in feed.once()])
    np.testing.assert_array_equal(labels, [1, 2, 2, 0, 1, -1, -1, -1])


@pytest.mark.parametrize(
    ("name", "file", "address"),
    [
        ("mnist", "train-images-idx3-ubyte.gz", "https://storage.googleapis.com/.*gz"),
        ("fashion_mnist", "train-images-idx3-ubyte.gz", "http://fashion-mnist.*gz"),
        ("cifar10", "cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/.*gz"),
        ("cifar100", "cifar-100-binary.tar.gz", "https://www.cs.toronto.edu/.*gz"),
        ("tiny_imagenet", "tiny-imagenet-200.zip", "http://cs231n.stanford.edu/.*zip"),
        ("imagenet", "ILSVRC2012_img_train.tar", "https://image-net.org/.*downloads"),
    ],
)
def test_a_missing_file_is_one_line_that_says_what_to_fetch(tmp_path, name, file, address):
    message = rf"^{name} needs {file}, .*: get it from {address} and put it into .*/{name}\.$"
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.load(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_left_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "SECONDS", 0.2)
    stop = threading.Event()
    monkeypatch.setattr(published.urllib.request, "urlopen", lambda *_, **__: stop.wait(60))
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"no answer within 0.2 seconds"):
        datasets.load("cifar10", tmp_path)
    assert time.monotonic() - begin < 2.0
    stop.set()


@pytest.mark.parametrize("missing", [0, 10])
def test_a_file_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch, missing):
    monkeypatch.undo()
    pictures = archives.images(30, 28, 28, 1)[..., 0]
    part = (pictures, _labels(30, 3))
    archives.idx(tmp_path / "server", {"train": part, "test": part}, packed=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = (tmp_path / "server" / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - missing])

        def log_message(self, *_):
            pass

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(mnist, "MNIST", f"http://127.0.0.1:{server.server_address[1]}/")
        try:
            if missing:
                with pytest.raises(ConfigError, match=r"train-images.*of .* bytes came"):
                    datasets.load("mnist", tmp_path)
            else:
                assert len(datasets.load("mnist", tmp_path).test.labels) == 30
        finally:
            server.shutdown()
            thread.join()
    files = [path.name for path in published.manual_folder(tmp_path, "mnist").iterdir()]
    assert len(files) == (0 if missing else 4)
