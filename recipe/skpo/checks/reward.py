"""Start-up checks of the reward function."""

from omegaconf import DictConfig

from recipe.skpo.settings import ConfigError
from reward_fns import OUR_REWARD, check_options


def check_reward(config: DictConfig) -> None:
    """Refuse a reward that cannot be loaded, and an unknown option of our own.

    The file may import anything, verl included, so the platform must have been applied.

    Raises:
        ValueError: naming the config path, and what was found there or the known values.
    """
    where, reward = "reward.custom_reward_function", config.reward.custom_reward_function
    if reward.path == OUR_REWARD:
        check_options(**(reward.get("reward_kwargs") or {}))
    if not reward.path:
        raise ConfigError(
            f"{where}.path: is not set; give a python file, or {OUR_REWARD} for the rewards of this recipe"
        )
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(module_path=reward.path, object_name=reward.name)
    except Exception as error:  # a process border: the file is somebody's own
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{where}: {reward.name} of {reward.path} cannot be loaded ({type(error).__name__}: {reason}); give a "
            f"python file or pkg://module by {where}.path and the function in it by {where}.name"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{where}.name: {reward.name} of {reward.path} is no function; name the one that gives rewards"
        )
