# Completion for bash: source this file, or install it as
# /usr/share/bash-completion/completions/cgtproxy.
# shellcheck shell=bash disable=SC2207 # bash 3 has no mapfile, and no name here holds a blank

_cgtproxy() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
	# from the program's tables: tests/config.rs writes it
	local commands="run check explain show status apps flush exec" targets="tproxy|route"
	# end
	local config=/etc/cgtproxy/cgtproxy.conf command="" target="" i word
	COMPREPLY=()

	# what stands before the word that is being typed
	for ((i = 1; i < COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		case $word in
			-c | --config) config=${COMP_WORDS[++i]} ;;
			-p | --pidfile | --ready-fd | -u | --user) ((i++)) ;;
			-*) ;;
			*)
				if [[ -z $command ]]; then
					command=$word
				elif [[ $command == exec ]]; then
					# CMD and its arguments are completed as on a line of their own
					if [[ -n $target ]]; then
						_cgtproxy_command $i
						return
					fi
					target=$word
				fi
				;;
		esac
	done

	case $prev in
		-c | --config | -p | --pidfile)
			COMPREPLY=($(compgen -f -- "$cur"))
			return
			;;
		-u | --user)
			COMPREPLY=($(compgen -u -- "$cur"))
			return
			;;
		--ready-fd) return ;;
	esac

	if [[ $cur == -* ]]; then
		local options="--config --verbose --help --version"
		case $command in
			"") options+=" --pidfile --syslog --ready-fd --no-seccomp --wait" ;;
			run) options+=" --pidfile --syslog --ready-fd --no-seccomp --wait" ;;
			explain) options+=" --pid" ;;
			check) options+=" --json" ;;
			status) options+=" --json --prometheus --watch" ;;
			apps) options+=" --json --suggest" ;;
			exec) options+=" --user" ;;
		esac
		COMPREPLY=($(compgen -W "$options" -- "$cur"))
		return
	fi

	case $command in
		"") COMPREPLY=($(compgen -W "$commands" -- "$cur")) ;;
		explain)
			if [[ " ${COMP_WORDS[*]} " == *" --pid "* ]]; then
				local pids
				pids=$(cd /proc && compgen -G "[0-9]*")
				COMPREPLY=($(compgen -W "$pids" -- "$cur"))
			else
				COMPREPLY=($(compgen -d -- "$cur"))
			fi
			;;
		exec)
			if [[ -n $target ]]; then
				_cgtproxy_command "$COMP_CWORD"
			else
				local names
				names=$(sed -nE "s/^[[:space:]]*\[($targets)[[:space:]]+([^]]*)\].*/\2/p" "$config" 2> /dev/null)
				COMPREPLY=($(compgen -W "direct drop $names" -- "$cur"))
			fi
			;;
	esac
}

# Completes CMD, which stands at word $1, or its arguments.
_cgtproxy_command() {
	local cur=${COMP_WORDS[COMP_CWORD]}
	if (($1 == COMP_CWORD)); then
		COMPREPLY=($(compgen -c -- "$cur"))
	elif declare -F _comp_command_offset > /dev/null; then
		_comp_command_offset "$1"
	elif declare -F _command_offset > /dev/null; then
		_command_offset "$1"
	else
		COMPREPLY=($(compgen -f -- "$cur"))
	fi
}

complete -F _cgtproxy cgtproxy
