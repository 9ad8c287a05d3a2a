from dataclasses import dataclass
from typing import Any

from threestudio.utils.base import BaseObject


@dataclass
class ExporterOutput:
    save_name: str
    save_type: str
    params: dict[str, Any]


class Exporter(BaseObject):
    @dataclass
    class Config(BaseObject.Config):
        save_video: bool = False

    def configure(self, geometry, material, background):
        self.geometry, self.material, self.background = geometry, material, background
