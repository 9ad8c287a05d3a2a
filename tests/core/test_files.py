"""Paths and safetensors files from untrusted sources are checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.io.checksums import sha256
from shared.io.safe_paths import safe_relative
from shared.io.safetensors_files import read_safetensors_header, safe_load_safetensors


def test_sha256_matches_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_safe_relative_refuses_paths_that_leave_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    assert safe_relative(root, "sub/a.png") == root / "sub/a.png"
    bad = ["../a", "sub/../../a", "/etc/passwd", "C:\\a", "..\\a", "\\\\host\\a", "~/a", "", ".", "a\0b", "c:a"]
    for name in bad:
        with pytest.raises(ValueError, match=r"is not a plain path|points outside"):
            safe_relative(root, name)
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="'link/a' points outside"):
        safe_relative(root, "link/a")


# --- safetensors --------------------------------------------------------------------------------


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_valid_files_load_unchanged(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {str(k): torch.arange(6).reshape(2, 3).to(k) for k in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.0), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    loaded = safe_load_safetensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(v.dtype == tensors[k].dtype and torch.equal(v.float(), tensors[k].float()) for k, v in loaded.items())
    header, metadata = read_safetensors_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"} and header["scalar"]["shape"] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_non_finite_values_are_refused(tmp_path: Path, value: float, kind: torch.dtype) -> None:
    save_file({"good": torch.ones(2), "up.weight": torch.tensor([1.0, value], dtype=kind)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: tensor 'up\.weight' contains NaN or Inf"):
        safe_load_safetensors(tmp_path / "a.safetensors")
    assert len(safe_load_safetensors(tmp_path / "a.safetensors", finite=False)) == 2


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "huge header": ({}, b"", 2**63, "a header of 9,223,372,036,854,775,808 bytes does not fit"),
    "header beyond the end": ({}, b"", 100, "a header of 100 bytes does not fit"),
    "not json": (b"{]", b"", None, "its header is not JSON"),
    "not utf-8": (b"\xff\xff", b"", None, "its header is not JSON"),
    "deep json": (b"[" * 100_000, b"", None, "its header is not JSON"),
    "a list": ([1], b"", None, "lists no tensors"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "its metadata is not text"),
    "dtype": ({"w": {**ENTRY, "dtype": "PICKLE"}}, bytes(8), None, "'w' has no known dtype"),
    "no entry": ({"w": 3}, bytes(8), None, "'w' has no known dtype: 3"),
    "negative": ({"w": {**ENTRY, "shape": [-2]}}, bytes(8), None, r"'w' has the invalid shape \[-2\]"),
    "bool shape": ({"w": {**ENTRY, "shape": [True]}}, bytes(8), None, "'w' has the invalid shape"),
    "enormous": ({"w": {**ENTRY, "shape": [2**39, 2**39]}}, bytes(8), None, "does not match its byte range"),
    "beyond": ({"w": {**ENTRY, "data_offsets": [0, 80]}}, bytes(8), None, "does not match its byte range"),
    "backwards": ({"w": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None, "does not match its byte range"),
    "cut off": ({"w": ENTRY}, bytes(4), None, "does not match its byte range"),
    "overlap": ({"v": ENTRY, "w": ENTRY}, bytes(8), None, "cannot be read as safetensors"),
    "hole": ({"w": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16), None, "cannot be read as safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_refused(tmp_path: Path, case: str) -> None:
    header, data, length, message = HOSTILE[case]
    path = raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message) as caught:
        safe_load_safetensors(path)
    assert str(path) in str(caught.value)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.safetensors cannot be read: No such file"):
        safe_load_safetensors(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        safe_load_safetensors(tmp_path)
    for data in (b"", b"abc", b"\x80\x02}q\x00." + bytes(100), bytes(8)):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            safe_load_safetensors(tmp_path / "x.safetensors")
