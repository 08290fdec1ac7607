"""Data parser specifications: what the entry points of the data parsers name.

Apart from `config`, since nerfstudio loads these while it is still importing its own data managers: an import of a
method from here would be circular.
"""

from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from diffusionerf_ns.dataparsers.dtu import DTUFewViewDataParserConfig
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataparsers.llff import LLFFFewViewDataParserConfig

few_view_data = DataParserSpecification(
    config=FewViewDataParserConfig(), description="Few-view captures: finds out what kind of capture a folder holds."
)

llff_few_view_data = DataParserSpecification(
    config=LLFFFewViewDataParserConfig(), description="LLFF captures (poses_bounds.npy) with the few-view splits."
)

dtu_few_view_data = DataParserSpecification(
    config=DTUFewViewDataParserConfig(), description="DTU scans (RegNeRF's or IDR's layout) with RegNeRF's split."
)
