# shellcheck shell=bash
# Shared by quickstart, test and uninstall: packages, the virtual environment, what belongs to us, output.
# Sourced, never run.
#
# The law: only what these scripts made is overwritten or removed. Packages are written down before they
# are installed, so that an interrupted run can be undone as well.

set -euo pipefail
case ${1:-} in
-h | --help)
    # A script's own first comment.
    sed -n '2,/^[^#]/{ /shellcheck/d; s/^# \{0,1\}//p; }' "$0"
    exit 0
    ;;
esac
checkout=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
home=${AGENTCTL_HOME:-$HOME/.agentctl}
case $home in /*) ;; *) home=$PWD/$home ;; esac
installed_list=$home/apt-installed
# Whom ./provision/test makes, when root runs it, for what belongs to an ordinary user.
# shellcheck disable=SC2034
test_user=agentctl-test

bold='' plain=''
[ ! -t 1 ] || bold=$'\033[1m' plain=$'\033[0m'
say() { printf '%s==>%s %s\n' "$bold" "$plain" "$*"; }
die() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo: $*" "run that command as root, then this script again"
    fi
}

# --- packages -----------------------------------------------------------------------------------------

# What running agentctl takes on a host: QEMU, what builds the image (gpg is how mmdebstrap finds out which
# of the keyrings is Debian's, on Ubuntu), what `agentctl view` mounts with, and Python's venv.
run_packages=(
    ca-certificates curl debian-archive-keyring e2fsprogs fuse3 gpg mmdebstrap
    python3 python3-venv qemu-utils tar uidmap util-linux
)
case $(dpkg --print-architecture 2>/dev/null || uname -m) in
arm64 | aarch64) run_packages+=(qemu-system-arm) ;;
*) run_packages+=(qemu-system-x86) ;;
esac

have_package() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed$'; }

# apt_get ARGUMENT...: apt-get that asks nothing, and that waits for the updates of a machine just started.
apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -y -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null
}

# need_packages NAME...: installs those that are missing.
need_packages() {
    command -v apt-get >/dev/null || die "this script knows Debian and Ubuntu (apt-get is missing)" \
        "install by your own means: $*"
    local missing=()
    for package in "$@"; do
        have_package "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing with apt: ${missing[*]}"
    apt_get update || say "apt-get update had errors (above); going on with the package lists there are"
    record_packages "${missing[@]}"
    apt_get install --no-install-recommends "${missing[@]}" ||
        die "apt-get could not install: ${missing[*]}" "see its message above, and try again"
}

# need_sshd NAME...: need_packages of openssh-server and those. Its package would start an sshd for everybody, now and
# at each boot. Where it was missing it is only a program here: Debian's units and init script leave it alone while
# that file is there, and purging the package removes it (remove_packages, should it never have been installed).
need_sshd() {
    if ! have_package openssh-server && [ ! -e "$no_sshd" ]; then
        say "sshd is for tests and comparisons only: $no_sshd keeps it from running as a server"
        as_root mkdir -p -- "$(dirname -- "$no_sshd")"
        printf '%s\n' "$no_sshd_text" | as_root tee -- "$no_sshd" >/dev/null
    fi
    need_packages "$@" openssh-server
}
no_sshd=/etc/ssh/sshd_not_to_be_run
no_sshd_text="agentctl's provision scripts have installed sshd as a program. To run it as a server, remove this file."

# record_packages NAME...: writes down what installing NAME... would add, one a line: those that were asked
# for by name, and the packages they need, followed by the word auto. What is only upgraded is left out.
record_packages() {
    local plan new
    plan=$(apt-get -s -qq install --no-install-recommends "$@") ||
        die "apt-get cannot install: $*" "see its message above; on Ubuntu the component universe is needed"
    (umask 077 && mkdir -p "$home")
    # Inst NAME (VERSION ...) is new, Inst NAME [VERSION] (VERSION ...) an upgrade.
    sed -n 's/^Inst \([^ ]*\) (.*/\1/p' <<<"$plan" | while read -r new; do
        case " $* " in *" $new "*) echo "$new" ;; *) echo "$new auto" ;; esac
    done >>"$installed_list"
}

# recorded_packages: those of the list that are still there and still only ours, one a line: a dependency
# that somebody has asked for by name since then is theirs.
recorded_packages() {
    [ -e "$installed_list" ] || return 0
    local theirs name kind
    theirs=" $(apt-mark showmanual | tr '\n' ' ') "
    sort -u "$installed_list" | while read -r name kind; do
        case $kind$theirs in auto*" $name "*) continue ;; esac
        ! have_package "$name" || echo "$name"
    done | sort -u
}

# remove_packages: purges what is recorded, except what something else has come to need.
# shellcheck disable=SC2086 # lists of package names, which have no spaces
remove_packages() {
    local packages others needed stay
    packages=$(recorded_packages)
    while [ -n "$packages" ]; do
        others=$(removed_along $packages)
        [ -n "$others" ] || break
        needed=$(apt-cache depends --recurse --installed --important $others | sed '/^[ <]/d' | sort -u)
        stay=$(comm -12 <(echo "$packages") <(echo "$needed"))
        [ -n "$stay" ] || die "apt-get would also remove ${others//$'\n'/ }" \
            "remove by hand what you no longer want of: ${packages//$'\n'/ }"
        say "these packages stay, because without them apt-get would remove ${others//$'\n'/ }:" $stay
        packages=$(comm -23 <(echo "$packages") <(echo "$needed"))
    done
    if [ -n "$packages" ]; then
        say "removing the packages that were installed for this:" $packages
        apt_get purge -o APT::Get::AutomaticRemove=false $packages ||
            die "apt-get could not remove them" "see its message above, and try again"
    fi
    if ! have_package openssh-server && grep -qsxF -e "$no_sshd_text" "$no_sshd"; then
        as_root rm -f -- "$no_sshd"
    fi
    rm -f "$installed_list"
}

# removed_along NAME...: what purging NAME... would remove besides, one a line.
removed_along() {
    local plan
    plan=$(apt-get -s -qq purge -o APT::Get::AutomaticRemove=false "$@") ||
        die "apt-get cannot remove: $*" "see its message above"
    comm -13 <(printf '%s\n' "$@" | sort -u) <(sed -n 's/^\(Purg\|Remv\) \([^ ]*\).*/\2/p' <<<"$plan" | sort -u)
}

# --- the virtual environment --------------------------------------------------------------------------

# venv_stamp VENV EXTRA: the file that says that VENV has what the project file asks for now, from here.
venv_stamp() {
    printf '%s/.installed-%s' "$1" \
        "$({ printf '%s\n' "$checkout" "$2" && cat "$checkout/pyproject.toml"; } | sha256sum | cut -c1-16)"
}

# make_venv VENV [EXTRA]: a virtual environment with this checkout installed, editable; again only when the
# project file has changed, the checkout has moved, or the Python it was made with has gone.
make_venv() {
    local venv=$1 extra=${2:-} stamp
    stamp=$(venv_stamp "$venv" "$extra")
    if "$venv/bin/python" -c '' 2>/dev/null; then
        [ ! -e "$stamp" ] || return 0
    else
        rm -rf "$venv"
    fi
    say "making the virtual environment $venv"
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "agentctl needs Python 3.11 or newer; this is $(/usr/bin/python3 --version)" \
            "use Debian 12, Ubuntu 24.04, or newer"
    /usr/bin/python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$checkout$extra"
    rm -f "$venv"/.installed-*
    touch "$stamp"
}

# --- what is ours -------------------------------------------------------------------------------------

# is_our_link PATH: whether PATH is a link into this checkout's environment or this home's tools.
is_our_link() {
    case $(readlink -- "$1" 2>/dev/null) in
    "$checkout/.venv/"* | "$home/tools/"*) return 0 ;;
    *) return 1 ;;
    esac
}

# offer_link PATH TARGET: PATH becomes a link to TARGET, unless it is somebody else's.
offer_link() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        is_our_link "$1" || {
            say "$1 is not ours and stays as it is; the program meant is $2"
            return 0
        }
    fi
    mkdir -p "$(dirname -- "$1")"
    ln -sfn -- "$2" "$1"
}

# user_words USER: sets the array as_user to the words that run a command as USER, from root. There is no
# process in between, so a signal to the job is a signal to the command.
user_words() {
    local folder
    folder=$(getent passwd "$1" | cut -d: -f6)
    # shellcheck disable=SC2034
    as_user=(
        setpriv "--reuid=$1" "--regid=$(id -g "$1")" --init-groups --
        env -u TMPDIR -u XDG_RUNTIME_DIR "HOME=$folder" "USER=$1" "LOGNAME=$1"
    )
}

# vm_runs HOME: whether an instance in HOME is alive; its lock is the proof, or else a QEMU left alone.
vm_runs() {
    local lock process
    for lock in "$1"/instances/*/lock; do
        [ ! -e "$lock" ] || flock --nonblock "$lock" true || return 0
    done
    # shellcheck disable=SC2013
    for process in $(grep -lsaF qemu-system /proc/[0-9]*/cmdline); do
        ! grep -qsaF -e "$1/instances/" "$process" || return 0
    done
    return 1
}

# is_instance NAME: whether an instance can be called so (host_agent/paths.py).
is_instance() { [[ $1 =~ ^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$ ]]; }

# end_vm HOME VENV [WORD...]: stops and deletes the instances in HOME, by the agentctl in VENV, run by WORD...
end_vm() {
    local of=$1 python=$2/bin/python instance
    shift 2
    [ -d "$of/instances" ] || return 0
    if (cd / && "$@" "$python" -P -c 'import host_agent.cli') 2>/dev/null; then
        for instance in "$of"/instances/*/; do
            instance=$(basename -- "$instance")
            is_instance "$instance" || continue
            (cd / && AGENTCTL_HOME=$of AGENTCTL_INSTANCE=$instance "$@" "$python" -P -m host_agent delete --data --yes) ||
                die "the VM $instance in $of could not be removed" "see: AGENTCTL_HOME=$of agentctl list"
        done
    fi
    ! vm_runs "$of" || die "a VM is running in $of, and what could stop it ($python) is missing or broken" \
        "make it again with ./provision/quickstart, then run this again"
}

# remove_trees PATH...: also what was made in a user namespace, and belongs to subordinate ids.
remove_trees() {
    [ $# -gt 0 ] || return 0
    local remove=(rm -rf --one-file-system --)
    "${remove[@]}" "$@" 2>/dev/null ||
        unshare --map-auto --map-root-user -- "${remove[@]}" "$@" 2>/dev/null ||
        as_root "${remove[@]}" "$@"
}

# remove_home HOME: what agentctl put there, and HOME itself if nothing else is in it. AGENTCTL_HOME may
# have been any folder, the user's own included, so nothing goes but by its name.
remove_home() {
    local path ours=()
    for path in "$1"/images/*; do
        [[ ! ${path##*/} =~ ^[0-9a-f]{16}$ ]] || ours+=("$path")
    done
    for path in "$1"/instances/*; do
        ! is_instance "${path##*/}" || ours+=("$path")
    done
    remove_trees "${ours[@]}" "$1"/images/.build-* "$1"/images/{.lock,failed-build.log} \
        "$1"/cache/accelerators.json "$1"/cache/{agent-*.pyz,.agent-*} "$1"/tools/bin/docker "$1"/tools/cli-plugins/docker-{compose,buildx} \
        "$1"/tools/.lock "$1"/tools/.staging-*
    for path in "$1"/{images,cache,tools/bin,tools/cli-plugins,tools,instances}; do
        rmdir -- "$path" 2>/dev/null || [ ! -e "$path" ] || say "$path stays: not all that is in it is agentctl's"
    done
}

# copy_sources FROM TO: the checkout's own files, as git knows them; all but what is made, where there is no
# git. FROM may belong to somebody else, whom git would not trust without being told so.
copy_sources() {
    mkdir -p "$2"
    if [ -e "$1/.git" ]; then
        git -c safe.directory="$1" -C "$1" ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do
                if [ -e "$1/$file" ] || [ -L "$1/$file" ]; then printf '%s\0' "$file"; fi
            done | tar -C "$1" --null --no-recursion -c -T -
    else
        tar -C "$1" -c --exclude=./.venv --exclude=./.test --exclude='./.*_cache' --exclude=./.hypothesis \
            --exclude=__pycache__ --exclude='*.egg-info' .
    fi | tar -x --no-same-owner -C "$2"
}
