#compdef @NAMES@
# zsh completion of nocloud, as `nocloud completion zsh` prints it.  nocloud itself reads the words up to the cursor,
# and says what there is to offer.

_nocloud() {
    local program=nocloud name=${service:t} found=1 row word
    local -a answer offered
    if [[ $name == nocloud(|.*) ]]; then program=${~${(Q)words[1]}}; fi
    # The answer: file or folder, or nothing; what the current word begins with before its value; words, each with a
    # tab and its help.
    answer=("${(@f)$("$program" complete zsh "$name" "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    compset -p ${#answer[2]}
    case $answer[1] in
        file) _files && found=0 ;;
        folder) _files -/ && found=0 ;;
    esac
    for row in $answer[3,-1]; do
        word=${${${row%%$'\t'*}//\\/\\\\}//:/\\:}
        offered+=("$word:${row#*$'\t'}")
    done
    _describe -t words word offered && found=0
    return found
}

if [[ $funcstack[1] == _nocloud ]]; then
    _nocloud "$@"
else
    compdef _nocloud @NAMES@
fi
