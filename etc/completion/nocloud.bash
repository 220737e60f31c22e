# bash completion of nocloud, as `nocloud completion bash` prints it.  In bash-completion's folder it has the name
# of each command.  nocloud itself reads the line up to the cursor, and says what there is to offer.

_nocloud() { # COMMAND WORD: as complete(1) of bash calls it; readline replaces WORD
    local IFS=$' \t\n' program=nocloud answer word
    if [[ ${1##*/} == nocloud || ${1##*/} == nocloud.* ]]; then
        program=${1//[\"\'\\]/} program=${program/#\~\//$HOME/}
    fi
    # The answer: file or directory, or nothing; what goes before each of these, what is taken off its beginning, what
    # it begins with; words, quoted.
    mapfile -t answer < <("$program" complete bash "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
    if [[ ${answer[0]} ]]; then
        compopt -o filenames # readline quotes then
        while IFS= read -r word; do answer+=("${answer[1]}${word#"${answer[2]}"}"); done < <(
            compgen -A "${answer[0]}" -- "${answer[3]}"
        )
    fi
    COMPREPLY=("${answer[@]:4}")
}

complete -F _nocloud @NAMES@
