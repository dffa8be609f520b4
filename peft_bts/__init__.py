"""Branch-Train-Stitch as a PEFT method: combine specialised language models into one generalist.

Importing this package registers the method `STITCH` with PEFT.
"""

from peft.utils import register_peft_method

from ._compat.accelerate import spread_data
from ._compat.peft import (
    add_peft_type,
    after_model_card,
    around_push,
    around_saving,
    before_setting_weights,
    check_config_files,
    keep_offloaded_hubs,
    take_seeds_from_configs,
    undo_failed_loads,
)
from ._compat.transformers import call_first


add_peft_type("STITCH")  # what follows needs the member

from .config import StitchConfig  # noqa: E402
from .distributed.parallel import check_before_loading, data_axis, expert_parallel  # noqa: E402
from .experts.compatibility import CompatibilityReport, check_compatibility  # noqa: E402
from .export.config import StitchExportConfig  # noqa: E402
from .export.model import StitchExportForCausalLM, StitchExportModel  # noqa: E402
from .forward.layer import StitchLayer  # noqa: E402
from .gates.callback import GateLogger  # noqa: E402
from .gates.trace import GateTrace, trace_gates  # noqa: E402
from .keys import check_trained_copies  # noqa: E402
from .model import StitchModel  # noqa: E402
from .planning.assess import assess  # noqa: E402
from .planning.assessment import Assessment  # noqa: E402
from .planning.estimate import Estimate, plan  # noqa: E402
from .reference import check_config_file  # noqa: E402
from .sharing.model_card import card_after_peft, card_before_upload, update_model_card  # noqa: E402
from .sharing.push import check_others_can_load, push_experts  # noqa: E402
from .sharing.saving import before_saving, where_the_seed_is  # noqa: E402
from .stitch import ExpertsIntoHub, HubIntoExperts  # noqa: E402


register_peft_method(name="stitch", config_cls=StitchConfig, model_cls=StitchModel)
keep_offloaded_hubs()
before_setting_weights(check_trained_copies)
undo_failed_loads(StitchModel._discard_adapter)
call_first(GateLogger)
check_config_files(lambda values, path: check_before_loading(check_config_file(values, path)))
spread_data(data_axis)
after_model_card(card_after_peft)
around_saving(before_saving, update_model_card)
take_seeds_from_configs(where_the_seed_is)
around_push(before=check_others_can_load, card=card_before_upload)

__version__ = "0.1.0"
__all__ = [
    "Assessment",
    "CompatibilityReport",
    "Estimate",
    "ExpertsIntoHub",
    "GateLogger",
    "GateTrace",
    "HubIntoExperts",
    "StitchConfig",
    "StitchExportConfig",
    "StitchExportForCausalLM",
    "StitchExportModel",
    "StitchLayer",
    "StitchModel",
    "assess",
    "check_compatibility",
    "expert_parallel",
    "plan",
    "push_experts",
    "trace_gates",
]
