"""Stands in for torchvision where it does not load: streaming imports it for vision datasets, which are not read here.

torchvision's wheels are built against one build of torch each; beside another one it fails at import.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    stubs = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional")
    }
    stubs["torchvision.transforms"] = ModuleType("torchvision.transforms")
    vars(stubs["torchvision.datasets"]).update(VisionDataset=object, CIFAR10=object)
    vars(stubs["torchvision.transforms.functional"]).update(to_tensor=None)
    for name, stub in stubs.items():
        stub.__spec__ = ModuleSpec(name, None)
    for name in [each for each in sys.modules if each.startswith("torchvision")]:
        del sys.modules[name]
    sys.modules.update(stubs)
