from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.data.mapping import map_files

ROOT = Path(__file__).parents[3]
PAGE = mmap.PAGESIZE


def write_parts(folder: Path, sizes: list[int]) -> tuple[list[Path], bytes]:
    """Files of random bytes, and their bytes in one piece."""
    rng = np.random.default_rng(0)
    parts = [rng.bytes(size) for size in sizes]
    paths = [folder / f"part-{i}" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    return paths, b"".join(parts)


@given(count=st.integers(1, 5), pages=st.integers(1, 3), last=st.floats(0, 1, exclude_min=True))
@settings(max_examples=40, deadline=None)
def test_files_read_as_one(tmp_path_factory, count, pages, last):
    stride = pages * PAGE
    sizes = [stride] * (count - 1) + [max(1, int(last * stride))]
    paths, content = write_parts(tmp_path_factory.mktemp("parts"), sizes)
    array = map_files(paths, stride_bytes=stride)
    assert array.dtype == np.uint8
    assert array.shape == (len(content),)
    assert array.tobytes() == content


def test_one_file_may_have_any_size(tmp_path):
    paths, content = write_parts(tmp_path, [1001])
    assert map_files(paths, stride_bytes=1001).tobytes() == content


@pytest.mark.parametrize("count", [1, 3])
def test_array_is_read_only(tmp_path, count):
    paths, content = write_parts(tmp_path, [PAGE] * count)
    array = map_files(paths, stride_bytes=PAGE)
    for view in (array, array[PAGE // 2 :].view(np.float16)):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
            view.flags.writeable = True
    assert b"".join(path.read_bytes() for path in paths) == content


def test_views_outlive_the_array_and_the_files(tmp_path):
    paths, content = write_parts(tmp_path, [PAGE] * 4)
    array = map_files(paths, stride_bytes=PAGE)
    view = array[PAGE - 7 :].reshape(-1, 1)[::3]
    del array
    for path in paths:
        path.unlink()
    assert view.tobytes() == content[PAGE - 7 :: 3]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_memory_is_given_back_with_the_last_view(tmp_path):
    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    paths, _ = write_parts(tmp_path, [PAGE] * 4)
    array = map_files(paths, stride_bytes=PAGE)
    view = array[5:9]
    del array
    assert is_mapped()
    del view
    assert not is_mapped()


def test_array_can_be_read_to_the_very_end_of_the_process(tmp_path):
    """Threads may still gather while Python exits; unmapping then would be a crash."""
    paths, content = write_parts(tmp_path, [PAGE] * 2)
    code = (
        "import atexit, sys\nfrom pathlib import Path\n"
        "from dimefm_edge.data.mapping import map_files\n"
        "atexit.register(lambda: print(int(array.sum(dtype='int64'))))\n"
        f"array = map_files([Path(p) for p in sys.argv[1:]], stride_bytes={PAGE})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{sum(content)}\n")


def test_files_can_be_mapped_by_huge_pages(tmp_path):
    paths, _ = write_parts(tmp_path, [PAGE] * 2)
    assert map_files(paths, stride_bytes=PAGE).ctypes.data % 2**21 == 0


def test_stride_must_be_whole_pages(tmp_path):
    paths, _ = write_parts(tmp_path, [100, 100])
    with pytest.raises(ValueError, match="100 bytes are not a whole number of"):
        map_files(paths, stride_bytes=100)


@pytest.mark.parametrize("sizes", [[PAGE - 1, PAGE], [PAGE + 1, 5], [PAGE, PAGE + 1], [PAGE, 0]])
def test_files_of_another_size_are_refused(tmp_path, sizes):
    paths, _ = write_parts(tmp_path, sizes)
    with pytest.raises(ValueError, match=f"all files but the last must have {PAGE} bytes"):
        map_files(paths, stride_bytes=PAGE)


def test_missing_file(tmp_path):
    paths, _ = write_parts(tmp_path, [PAGE])
    with pytest.raises(FileNotFoundError):
        map_files([*paths, tmp_path / "none"], stride_bytes=PAGE)


def test_what_cannot_be_mapped_is_an_os_error(tmp_path):
    """A folder has a size, and cannot be mapped."""
    folder = tmp_path / "folder"
    folder.mkdir()
    stride = folder.stat().st_size
    if stride == 0 or stride % PAGE:
        pytest.skip("folders of this file system have no size in pages")
    paths, _ = write_parts(tmp_path, [stride])
    with pytest.raises(OSError, match="mmap"):
        map_files([*paths, folder], stride_bytes=stride)
