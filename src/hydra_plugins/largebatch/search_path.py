"""Hydra's door to the user's own choices: `--config-dir` before the package's files."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from largebatch.conf.user_configs import folders


class UserConfigs(SearchPathPlugin):
    """Puts the folder of --config-dir in front, where Hydra would put it last."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(folders()):
            search_path.prepend("command-line", f"file://{folder}")
