"""What every test stands on: 8 virtual CPU devices, strict shapes, real data where it is."""

import gc
import os
import pathlib
import tempfile
import threading

from tests import xla_flags

# Before jax starts. On a machine with few cores, 8 virtual devices starve each other's collectives
# unless the thread pools are sized as if there were a core for each (jax 0.10 aborts otherwise).
os.environ.setdefault("NPROC", "16")
# Of torch's threads, those without work spin; for tiny models one is enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "huatuo_jax_test_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "XLA_FLAGS" not in os.environ:  # Of several workers the first process asks for all.
    os.environ["XLA_FLAGS"] = xla_flags.for_tests()

import fsspec
import jax
import pytest
from jax._src import compilation_cache

from huatuo_jax.core import sharding
from huatuo_jax.core.files import remove_folder
from tests import shared_programs
from tests.bucket_server import Buckets, environment, serving

# Tracing makes many objects of a short life. Where garbage is looked for less often, fewer of them
# are found alive and looked at again with all the others.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def _only_cache_programs_of_one_device():
    """Keeps programs of several devices out of the compilation cache, and only those.

    A run has one mesh, so the package disables the cache for the whole process at the first of
    several devices. The tests of a process have many: each program is asked for its devices, and
    one without a key is neither looked up nor written.
    """
    key_of = compilation_cache.get_cache_key

    def key_of_one_device(module, devices, *options, **named):
        return key_of(module, devices, *options, **named) if devices.size == 1 else None

    compilation_cache.get_cache_key = key_of_one_device
    sharding._compile_anew = lambda: None


_only_cache_programs_of_one_device()
shared_programs.share_programs()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data, beside the checkout or where HUATUO_SHARED_DATA says."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("HUATUO_SHARED_DATA", beside))
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip(f"no real data at {folder} (set HUATUO_SHARED_DATA to its folder)")
    return folder


@pytest.fixture(scope="module")
def on_one_device():
    """Meshes of all devices have one."""
    make_mesh = sharding.make_mesh

    def make(*, devices=None, **sizes):
        return make_mesh(**sizes, devices=devices or jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make)
        yield


@pytest.fixture(scope="session")
def _bucket_server():
    """A server of Google Cloud Storage that every library of this process and its own asks."""
    buckets = Buckets("bucket", "my-bucket")
    with serving(buckets) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.address).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield buckets


@pytest.fixture
def bucket(_bucket_server):
    """The buckets of the server, with an empty one named `bucket`."""
    _bucket_server.reset()
    yield _bucket_server
    _bucket_server.reset()


@pytest.fixture(scope="session")
def _s3_server():
    """A server of S3 that every library of this process asks; it has the bucket `bucket`."""
    pytest.importorskip("s3fs")
    moto, werkzeug = map(pytest.importorskip, ("moto.server", "werkzeug.serving"))
    # One request after another, as a condition on an object has to hold while it is written.
    app = moto.DomainDispatcherApplication(moto.create_backend_app)
    server = werkzeug.make_server("127.0.0.1", 0, app, threaded=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-the-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield
    server.shutdown()


@pytest.fixture
def s3(_s3_server):
    """The bucket `bucket` of a server of S3, empty."""
    yield
    remove_folder("s3://bucket")
