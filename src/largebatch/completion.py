"""Shell completion: `eval "$(largebatch train --shell-completion install=bash)"`, zsh and fish too.

The shell asks `largebatch --complete`, which has the line so far in COMP_LINE.
"""

import os
import sys
from typing import Final

OVERRIDES: Final = ("train", "sweep", "plan", "coord")
"""Commands whose words Hydra knows."""

_BASH: Final = """_largebatch() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }" choices choice
    choices=$(COMP_LINE="$line" "${COMP_WORDS[0]}" --complete 2>/dev/null)
    COMPREPLY=()
    # Not by `compgen -W`, which runs what names of files hold; and none that would run once taken.
    while IFS= read -r choice; do
        case $choice in *[\\$\\`\\;\\&\\|\\<\\>\\(\\)]*) continue ;; esac
        [[ $choice == "$word"* ]] && COMPREPLY+=("$choice")
    done <<< "$choices"
    # The shell takes what follows the last = or : for the word.
    local before="${word%"${word##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o nospace -o default -F _largebatch largebatch
"""
SCRIPTS: Final = {
    "bash": _BASH,
    "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    + _BASH,
    "fish": "complete -c largebatch -f "
    "-a '(COMP_LINE=(commandline -cp) (commandline -cpo)[1] --complete 2>/dev/null)'\n",
}


def script(arguments: list[str]) -> str | None:
    """Return the script that a command line asks for with `--shell-completion install=SHELL`."""
    if not {"-sc", "--shell-completion"} & set(arguments):
        return None
    shells = [word.removeprefix("install=") for word in arguments if word.startswith("install=")]
    return SCRIPTS.get(shells[0]) if shells else None


def candidates(commands: list[str]) -> None:
    """Print the words that may stand where the line in COMP_LINE ends."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()[1:]
    if len(words) < 2 and not (words and line.endswith(" ")):
        begun = words[0] if words else ""
        print("\n".join(command for command in commands if command.startswith(begun)))
    elif words[0] in OVERRIDES:
        from largebatch.train.hydra_app import parse_options, run_hydra

        options = parse_options(words[1:])
        last = " " if line.endswith(" ") else ""
        os.environ["COMP_LINE"] = " ".join(["largebatch", *options.overrides]) + last
        folder = [] if options.config_dir is None else [f"--config-dir={options.config_dir}"]
        run_hydra(lambda config: None, words[0], [*folder, "--shell-completion", "query=fish"])
        sys.stdout.flush()
