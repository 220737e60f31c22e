# fish completion of nocloud, as `nocloud completion fish` prints it.  In fish's folders it has each command's name.
# nocloud itself reads the words up to the cursor, and says what there is to offer.

function __nocloud_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l program nocloud
    if string match -qr -- '(^|/)nocloud(\.[^/]*)?$' $words[1]
        set program (string replace -r '^~/' "$HOME/" -- $words[1])
    end
    # The answer: file or folder, or nothing; what the current word begins with before its value; words, each with a
    # tab and its help.
    set -l answer (command $program complete fish $words (string unescape -- $word; or echo) 2>/dev/null)
    if test -n "$answer[1]" # files are fish's own way, behind a command that it knows nothing of
        set -l files (complete -C "'' "(string sub -s (math 1 + (string length -- "$answer[2]")) -- $word))
        test $answer[1] = folder; and set files (string match -r '.*/$' -- $files)
        set -a answer $files
    end
    test (count $answer) -gt 2; and string join -- \n $answer[2]$answer[3..-1]
end

for name in @NAMES@
    complete -c $name -f -a '(__nocloud_complete)'
end
