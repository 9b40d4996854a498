"""Entry point `skpo_cpu` of the group `verl.plugins`: importing this module activates the CPU platform.

verl imports it in every process that imports verl (verl/__init__.py:57-76), driver and Ray workers alike, and logs
failures only at DEBUG. So this module prints its traceback, keeps the error for `check_active`, and leaves the platform
unregistered. verl then stops with "Unknown platform 'cpu'".

Modules of VERL_USE_EXTERNAL_MODULES are imported before entry points. If one of them needs the platform, this module
must come first there (`apply_environment` does that). Importing it a second time does nothing.
"""

import sys
import traceback

import recipe.skpo.cpu as package


def activate() -> None:
    """Register the platform last, so that a failure before leaves verl without one."""
    from verl.plugin.platform import PlatformRegistry

    from recipe.skpo.cpu import distribution_alias, process_group
    from recipe.skpo.cpu.cpu_platform import CpuPlatform
    from recipe.skpo.cpu.override import OverrideError

    registered = PlatformRegistry.get("cpu")
    if registered is not None and registered is not CpuPlatform:
        raise OverrideError(
            f"verl already knows a platform 'cpu' ({registered.__module__}.{registered.__name__}): "
            f"recipe.skpo.cpu was written for verl 0.9.1, which has none"
        )
    missing = sorted(CpuPlatform.__abstractmethods__)
    if missing:
        raise OverrideError(
            f"PlatformBase (verl/plugin/platform/platform_base.py) asks for {', '.join(missing)}, which "
            f"recipe/skpo/cpu/cpu_platform.py, written for verl 0.9.1, does not have"
        )
    distribution_alias.install()
    process_group.OVERRIDE.install()
    if registered is None:
        PlatformRegistry.register(platform="cpu")(CpuPlatform)


if package.is_selected():
    try:
        activate()
        package._activation_failure = None
    except Exception as error:
        package._activation_failure = f"{type(error).__name__}: {error}"
        print("recipe.skpo.cpu: the CPU platform could not be activated", file=sys.stderr)
        traceback.print_exc()
        raise
