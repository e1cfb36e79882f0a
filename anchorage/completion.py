"""`anchorage completion bash`: completion of commands, flags and their values in a shell.

    eval "$(anchorage completion bash)"           # in ~/.bashrc
    eval "$(anchorage completion zsh)"            # in ~/.zshrc, after compinit
    anchorage completion fish | source            # in ~/.config/fish/config.fish

The output is a table made from the parsers of the commands, and a function in the shell's language
that looks words up in it. So the Tab key does not start Python.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import criteria
import dataset
import door
import net
from anchorage.commands import COMMANDS, Command, commands, run
from options.files import RECIPES
from options.parser import Parser
from terminal import say
from utils import sentence_errors

OF_PATHS = ("FILE", "DIR", "RUN", "IMAGE", "WHAT", "PATH", "INDEX")
"""A value is a path if its name in --help begins with one of these."""
LONGEST = 70  # characters of a flag's description


class Option(NamedTuple):
    """A flag: its spellings, description, whether it needs a value, and its known values.

    `files` says whether a value is a path, `several` whether it takes several values.
    """

    spellings: tuple[str, ...]
    about: str
    takes: bool
    words: tuple[str, ...] = ()
    files: bool = False
    several: bool = False

    @property
    def listed(self) -> str:
        """Its values, in the notation of the tables for bash and zsh."""
        files, more = ["<file>"] * self.files, ["<more>"] * self.several
        return " ".join([*self.words, *files, *more])


class Syntax(NamedTuple):
    """The words that may follow a command such as `train` or `dataset check`."""

    command: str
    options: tuple[Option, ...] = ()
    words: tuple[str, ...] = ()
    files: bool = False
    recipes: bool = False


# --- the syntax of the commands -------------------------------------------------------------------


class _Parsing(BaseException):
    """Raised when a parser is about to read the command line; no handler on the way catches it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser of a command, which is started and stopped where it would read its arguments."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise _Parsing(parser)

    before = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop
    try:
        run(command, ())
    except _Parsing as stopped:
        parser = stopped.parser
        for word in command.words:
            parser = _subcommands(parser)[word]
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = before
    raise AssertionError(f"{command.module} read no command line")


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def syntaxes() -> Iterator[Syntax]:
    """The syntax of each command; that of `anchorage` itself has the name ''."""
    yield Syntax("", words=(*commands(), "--help", "--version"))
    for name, command in commands().items():
        if name == "completion":
            yield Syntax(name, words=tuple(SHELLS))
        else:
            yield from _of_parser(name, parser_of(command))


def _of_parser(name: str, parser: argparse.ArgumentParser) -> Iterator[Syntax]:
    shown = (a for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS)
    options = tuple(map(_option, shown))
    inside = _subcommands(parser)
    positional = [a for a in parser._actions if not a.option_strings and a.dest != "command"]
    words = tuple(word for action in positional for word in _words(action))
    # Only the options of a run are read from files of flags.
    recipes = any(option.spellings[0] == "--dataset" for option in options)
    files = not inside and any(map(_is_path, positional))
    yield Syntax(name, options, (*inside, *words), files, recipes)
    for subcommand, its_parser in inside.items():
        yield from _of_parser(f"{name} {subcommand}", its_parser)


def _option(action: argparse.Action) -> Option:
    takes = action.nargs not in (0, "?")
    about = re.sub(r"\s+", " ", (action.help or "").replace("%%", "%"))
    about = re.sub(r"%\(\w+\)s", str(action.default), about)
    about = textwrap.shorten(about, LONGEST, placeholder=" …")
    files, several = takes and _is_path(action), action.nargs in ("+", "*")
    return Option(tuple(action.option_strings), about, takes, _words(action), files, several)


def _is_path(action: argparse.Action) -> bool:
    return isinstance(action.metavar, str) and action.metavar.startswith(OF_PATHS)


def _words(action: argparse.Action) -> tuple[str, ...]:
    """The known values of a flag or an argument."""
    if isinstance(action, argparse._SubParsersAction):
        return ()
    if action.choices:
        return tuple(map(str, action.choices))
    known: dict[str, Callable[[], Sequence[str]]] = {
        "dataset": lambda: (*dataset.NAMES, "folder:", "csv:"),
        "loss": lambda: tuple(criteria.LOSSES),
        "model": lambda: (*net.MODELS, net.TIMM),
    }
    return tuple(known[action.dest]()) if action.dest in known else ()


# --- bash -----------------------------------------------------------------------------------------

BASH = r"""_anchorage() {
    # The words as typed, because bash also splits them at = and :. "\ " is a blank inside a name.
    local line=${COMP_LINE:0:COMP_POINT} word flag= after=0 command= longer cur
    local -a typed
    read -a typed <<<"$line"
    [[ $line == *[[:space:]] && $line != *\\[[:space:]] ]] && typed+=("")
    cur=${typed[${#typed[@]}-1]}
    for word in "${typed[@]:1:${#typed[@]}-2}"; do
        longer="${command:+$command }$word"
        _anchorage_words "$longer" >/dev/null && command=$longer
        if [[ $word == -* ]]; then flag=$word after=0; else (( ++after )); fi
    done
    local words= there=
    if [[ $cur == --*=* ]] && words=$(_anchorage_values "$command" "${cur%%=*}"); then
        cur=${cur#*=}
    elif words=$(_anchorage_values "$command" "$flag") &&
        [[ $after == 0 || $cur != -* && $words == *'<more>'* ]]; then
        words=${words//'<more>'/}
    else
        words=$(_anchorage_words "$command")
        [[ $cur == -* ]] || words=$(printf '%s\n' $words | grep -v '^-')
    fi
    COMPREPLY=($(compgen -W "${words//'<file>'/}" -- "$cur"))
    if [[ $cur == @* ]]; then
        words=$(_anchorage_recipes "$command")
        COMPREPLY=($(compgen -W "$words" -- "$cur"; compgen -f -P @ -- "${cur#@}"))
    elif [[ $words == *'<file>'* || $cur == folder:* || $cur == csv:* ]]; then
        there=${cur%"${cur##*:}"}
        local IFS=$'\n'
        COMPREPLY+=($(compgen -f ${there:+-P} ${there:+"$there"} -- "${cur##*:}"))
        compopt -o filenames 2>/dev/null
    fi
    local only=${COMPREPLY[0]} k
    if [[ ${#COMPREPLY[@]} == 1 && ( $only == *: || -d ${only#*[:@]} ) ]]; then
        compopt -o nospace 2>/dev/null
    fi
    # Bash replaces only the end of the word, which is $2: the part before it must be left out.
    IFS= read word <<<"$2"
    there=${cur%"$word"}
    [[ -n $there ]] && for k in "${!COMPREPLY[@]}"; do
        COMPREPLY[k]=${COMPREPLY[k]#"$there"}
    done
}
complete -F _anchorage anchorage"""


def bash(found: Sequence[Syntax]) -> str:
    """The completion for bash: tables as functions, and `BASH`, which calls them."""
    words, values, recipes = [], [], []
    for syntax in found:
        flags = [spelling for option in syntax.options for spelling in option.spellings]
        listed = [*syntax.words, *(["<file>"] if syntax.files else []), *flags]
        words.append(f"    {_quoted(syntax.command)}) echo {_quoted(' '.join(listed))};;")
        for option in syntax.options:
            if not option.takes and not option.words:
                continue
            names = "|".join(_quoted(f"{syntax.command} {name}") for name in option.spellings)
            values.append(f"    {names}) echo {_quoted(option.listed)};;")
        if syntax.recipes:
            recipes.append(f"    {_quoted(syntax.command)}) echo {_quoted(' '.join(_recipes()))};;")
    tables = [
        ("_anchorage_words", '"$1"', words),
        ("_anchorage_values", '"$1 $2"', values),
        ("_anchorage_recipes", '"$1"', recipes),
    ]
    functions = [
        "\n".join(
            [f"{name}() {{", f"    case {key} in", *lines, "    *) return 1;;", "    esac", "}"]
        )
        for name, key, lines in tables
    ]
    return "\n".join([*functions, BASH])


def _recipes() -> list[str]:
    return [f"@recipes/{path.name}" for path in sorted(RECIPES.glob("*.txt"))]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- zsh ------------------------------------------------------------------------------------------

ZSH = r"""_anchorage() {
    local command= word longer flag= after=0
    local -a typed flags
    typed=("${(@)words[2,CURRENT-1]}")
    for word in $typed; do
        longer="${command:+$command }$word"
        (( ${+_anchorage_flags[$longer]} )) && command=$longer
        if [[ $word == -* ]]; then flag=$word after=0; else (( ++after )); fi
    done
    if compset -P '@'; then
        [[ -n ${_anchorage_recipes[$command]} ]] && compadd -- ${=_anchorage_recipes[$command]}
        _files
        return
    fi
    compset -P 1 '(#b)(--[^=]#)=' && flag=$match[1] after=0
    local values=${_anchorage_values[$command $flag]-none}
    if [[ $values != none && ( $after == 0 || $PREFIX != -* && $values == *'<more>'* ) ]]; then
        _anchorage_offer ${=values//'<more>'/}
    elif [[ $PREFIX == -* ]]; then
        flags=("${(@f)_anchorage_flags[$command]}")
        _describe -o flag flags
    else
        _anchorage_offer ${=_anchorage_words[$command]}
    fi
}
_anchorage_offer() {
    local word
    for word in "$@"; do
        if [[ $word == '<file>' ]]; then _files
        elif [[ $word == *: ]]; then
            if compset -P "$word"; then _files; else compadd -S '' -- $word; fi
        else compadd -- $word; fi
    done
}
compdef _anchorage anchorage"""


def zsh(found: Sequence[Syntax]) -> str:
    """The completion for zsh: tables as associative arrays, and `ZSH`, which reads them."""
    tables: dict[str, list[str]] = {"words": [], "flags": [], "values": [], "recipes": []}
    for syntax in found:
        files = ["<file>"] if syntax.files else []
        flags = [
            f"{spelling}:{option.about}"
            for option in syntax.options
            for spelling in option.spellings
        ]
        _add(tables["words"], syntax.command, " ".join([*syntax.words, *files]))
        _add(tables["flags"], syntax.command, "\n".join(flags))
        if syntax.recipes:
            _add(tables["recipes"], syntax.command, " ".join(_recipes()).replace("@", ""))
        for option in syntax.options:
            if option.takes or option.words:
                for spelling in option.spellings:
                    _add(tables["values"], f"{syntax.command} {spelling}", option.listed)
    declared = [
        "\n".join([f"typeset -gA _anchorage_{name}=(", *lines, ")"])
        for name, lines in tables.items()
    ]
    return "\n".join(["#compdef anchorage", *declared, ZSH])


def _add(table: list[str], key: str, value: str) -> None:
    table.append(f"    {_quoted(key)} {_quoted(value)}")


# --- fish -----------------------------------------------------------------------------------------

FISH = r"""function __anchorage_in
    set -l typed (commandline -opc)
    set -l command
    for word in $typed[2..]
        set -l longer (string trim "$command $word")
        contains -- $longer $__anchorage_commands; and set command $longer
    end
    test "$command" = "$argv"
end
function __anchorage_more
    __anchorage_in $argv[1]; or return 1
    for word in (commandline -opc)[-1..2]
        if string match -q -- '-*' $word
            contains -- $word $argv[2..]
            return
        end
    end
    return 1
end
function __anchorage_recipes
    set -l typed (commandline -ct)
    string match -q '@*' -- $typed
    and __fish_complete_path (string sub -s 2 -- $typed) | string replace -r '^' '@'
end"""


def fish(found: Sequence[Syntax]) -> str:
    """The completion for fish: a line for each flag."""
    lines = ["complete -c anchorage -e", "complete -c anchorage -f"]
    named = [_fish(syntax.command) for syntax in found if syntax.command]
    lines.append(f"set -g __anchorage_commands {' '.join(named)}")
    lines.append(FISH)
    about = {name: command.about for name, command in COMMANDS.items()}
    for syntax in found:
        rule = f"complete -c anchorage -n {_fish(f'__anchorage_in {syntax.command}'.rstrip())}"
        for word in syntax.words:
            said = f" -d {_fish(about[word])}" if not syntax.command and word in about else ""
            lines.append(f"{rule} -a {_fish(word)}{said}")
        if syntax.files:
            lines.append(f"{rule} -F")
        if syntax.recipes:
            lines.append(f"{rule} -a {_fish(' '.join(_recipes()))} -d recipe")
            lines.append(f"{rule} -a '(__anchorage_recipes)'")
        for option in syntax.options:
            lines.append(" ".join([rule, *_fish_option(option)]))
            if option.several and (values := [*_fish_values(option)]):
                more = f"__anchorage_more {_fish(syntax.command)} {' '.join(option.spellings)}"
                lines.append(" ".join(["complete -c anchorage -n", _fish(more), *values]))
    return "\n".join(lines)


def _fish_option(option: Option) -> Iterator[str]:
    for spelling in option.spellings:
        yield f"-l {spelling[2:]}" if spelling.startswith("--") else f"-s {spelling[1:]}"
    yield f"-d {_fish(option.about)}"
    if option.takes:
        yield "-r"
    yield from _fish_values(option)


def _fish_values(option: Option) -> Iterator[str]:
    if option.files:
        yield "-F"
    if option.words:
        yield f"-a {_fish(' '.join(option.words))}"


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- the command ----------------------------------------------------------------------------------

SHELLS: dict[str, Callable[[Sequence[Syntax]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the completion for a shell."""
    parser = Parser(
        prog="anchorage completion",
        description="Print what a shell needs to complete commands, flags and values.",
        epilog='~/.bashrc: eval "$(anchorage completion bash)"\n'
        '~/.zshrc, after compinit: eval "$(anchorage completion zsh)"\n'
        "~/.config/fish/config.fish: anchorage completion fish | source",
    )
    parser.add_argument("shell", choices=SHELLS)
    args = parser.parse_args(argv)
    with sentence_errors(), door.answering():
        with contextlib.redirect_stdout(None):
            found = list(syntaxes())
        say(SHELLS[args.shell](found))


if __name__ == "__main__":
    main()
