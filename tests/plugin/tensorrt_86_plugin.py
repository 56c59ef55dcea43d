"""Asks TensorRT 8.6, without a GPU, whether the plugin's creators do what an engine needs of them. For Python 3.10.

python tensorrt_86_plugin.py LIBRARY OP_TYPE ATTRIBUTES    prints one JSON object, as ATTRIBUTES is one
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from typing import Any

import numpy as np
import tensorrt as trt

library, op_type, attributes = sys.argv[1:]
registry = trt.get_plugin_registry()
before = registry.get_plugin_creator(op_type, "1", "")
ctypes.CDLL(library)
creator = registry.get_plugin_creator(op_type, "1", "")


def node(**attributes: Any) -> Any:
    """A plugin with these attributes, floats as FLOAT32 and integers as INT32; None if the creator refuses them."""
    fields = []
    for name, values in attributes.items():
        array = np.atleast_1d(np.array(values, np.float32 if isinstance(values, float) else np.int32))
        kind = trt.PluginFieldType.FLOAT32 if array.dtype == np.float32 else trt.PluginFieldType.INT32
        fields.append(trt.PluginField(name, array, kind))
    return creator.create_plugin("node", trt.PluginFieldCollection(fields))


good = json.loads(attributes)
layout = f"<4si{''.join('f' if isinstance(value, float) else 'i' for value in good.values())}"
first = next(iter(good))
plugin = node(**good)
plan = bytes(plugin.serialize())
read = creator.deserialize_plugin("node", plan)
bad_plans = {
    "another version": plan[:4] + struct.pack("<i", 2) + plan[8:],
    "another magic": b"xxxx" + plan[4:],
    "cut off": plan[:-1],
    "too long": plan + b"\0",
    "empty": b"",
    "no heads": plan[:8] + struct.pack("<i", 0) + plan[12:],
}
bad_attributes = [
    {first: 1.0},
    {first: [1, 2]},
    {"kernel_size": 4},
    *({name: 0} for name in good if name != "scale"),
    *({name: value} for name in good if name == "scale" for value in (float("nan"), 1)),
]
json.dump(
    {
        "version": trt.__version__,
        "registered before": before is not None,
        "fields": [field.name for field in creator.field_names],
        "type": [plugin.plugin_type, plugin.plugin_version, plugin.plugin_namespace, plugin.num_outputs],
        "plan": struct.unpack(layout, plan)[1:],
        "clone equal": bytes(plugin.clone().serialize()) == plan,
        "read equal": read is not None and bytes(read.serialize()) == plan,
        "defaults": struct.unpack(layout, bytes(node().serialize()))[2:],
        "bad plans accepted": [name for name, bad in bad_plans.items() if creator.deserialize_plugin("node", bad)],
        "bad attributes accepted": [bad for bad in bad_attributes if node(**bad)],
    },
    sys.stdout,
)
