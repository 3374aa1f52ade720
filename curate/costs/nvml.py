"""NVIDIA's management library: a GPU's energy counter and its power, through pynvml or the driver's own library.

pynvml is used where it is installed; the driver's library, which is there wherever the GPU works, has the same
functions and is called through ctypes. A reading costs some ten microseconds and wakes no idle GPU.
Source: NVIDIA, NVML API reference, section "Device Queries".
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Final, Protocol

_LIBRARIES: Final = ("libnvidia-ml.so.1", "nvml.dll")
_REASONS: Final = {1: "not initialised", 2: "invalid argument", 3: "not supported", 4: "no permission", 6: "not found"}
_REASONS_MORE: Final = {9: "driver not loaded", 15: "GPU is lost", 999: "unknown error"}


class NvmlError(Exception):
    """A call that NVML refused; ours, as pynvml's class is there only with pynvml."""


class Nvml(Protocol):
    """The part of pynvml that is used here."""

    def nvmlInit(self) -> Any: ...  # noqa: N802

    def nvmlShutdown(self) -> Any: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...  # noqa: N802

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        """Millijoules since the driver was loaded; Volta and newer."""
        ...

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:  # noqa: N802
        """Milliwatts."""
        ...


def find_nvml() -> Nvml | None:
    """pynvml, or the driver's library, or None where neither is there."""
    try:
        module: Any = importlib.import_module("pynvml")
    except ImportError:
        return _driver()
    found: Nvml = module
    return found


def _driver() -> Nvml | None:
    for name in _LIBRARIES:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError:
            continue
    return None


class Driver:
    """The driver's library with pynvml's names."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def nvmlInit(self) -> None:  # noqa: N802
        self._call("nvmlInit_v2")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._call("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return int(count.value)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:  # noqa: N802
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> ctypes.c_void_p:  # noqa: N802
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        return int(millijoules.value)

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        milliwatts = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", handle, ctypes.byref(milliwatts))
        return int(milliwatts.value)

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = int(getattr(self._library, name)(*arguments))
        except AttributeError as error:
            raise NvmlError(f"{name} is not in this driver's library") from error
        if code:
            raise NvmlError((_REASONS | _REASONS_MORE).get(code, f"error {code}"))
