"""A device that is made up, for caches that are offloaded."""

import torch
from transformers import cache_utils


class Device:
    """Stands in for a GPU and its streams: layers of an offloading cache are at home only after a prefetch."""

    LAYERS = ["DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"]

    def __init__(self, monkeypatch):
        self.away = 0
        monkeypatch.setattr(torch, "Stream", lambda *args: self)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: self)
        for name in self.LAYERS:
            self._patch(getattr(cache_utils, name), monkeypatch)

    def _patch(self, layer_class, monkeypatch):
        update = layer_class.update

        def offload(layer):
            layer.is_away = True
            self.away += 1

        def prefetch(layer):
            layer.is_away = False

        def checked_update(layer, *args, **kwargs):
            assert not getattr(layer, "is_away", False), "this layer's states are not on the device"
            return update(layer, *args, **kwargs)

        for name, function in {"offload": offload, "prefetch": prefetch, "update": checked_update}.items():
            monkeypatch.setattr(layer_class, name, function)

    def wait_stream(self, other):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass
