#!/bin/sh
# Installs or upgrades rbc-edge as a systemd service, from a wheel, on Debian 12/13, Ubuntu and Raspberry Pi OS
# (64 bit). You can run it again at any time. It keeps results, settings and the ledger (the database of all
# counts). If it fails, everything stays as it was.
set -eu
umask 022

# Root must run nothing that lies in the folder of the caller. Python looks for modules in the current folder and in
# folders that variables name. So the script leaves that folder first, and calls Python only with -I (isolated).
caller=$(pwd)
cd /
unset CDPATH PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE

usage() {
    cat <<'END'
usage: install.sh rbc_edge-VERSION.whl [options]

  --source DIR       the camera's folder, at the first installation (later: /etc/rbc-edge/config.toml)
  --out DIR          folder for the results  [default: /var/lib/rbc-edge]
  --group GROUP      add the service to this group, which can read the camera's folder
  --wheels DIR       install from the packages (wheels) in DIR, without network
  --constraint FILE  exact versions for pip, instead of the tested ones in requirements.txt, without a check of hashes
  --prometheus       also install what the Prometheus text file needs
  --review           also install the review page, off until it has a password (docs/review.md)
  --python PROGRAM   the Python to use, 3.11 or newer  [default: /usr/bin/python3]
  --no-start         install, but do not start or restart the service
  -h, --help
END
}

say() { printf '%s\n' "rbc-edge: $*"; }
die() {
    printf '%s\n' "install.sh: $1" >&2
    [ $# -lt 2 ] || printf '  %s\n' "$2" >&2
    exit "${3:-1}"
}
wrong() { die "$1" "see install.sh --help" 2; }

# -- options ---------------------------------------------------------------------------------------------

wheel='' source='' out='' group='' wheels='' constraint='' extras='' python='' start=yes
while [ $# -gt 0 ]; do
    case $1 in
        --source | --out | --group | --wheels | --constraint | --python)
            if [ $# -lt 2 ] || [ -z "$2" ]; then wrong "$1 needs a value"; fi
            case $1 in
                --source) source=$2 ;;
                --out) out=$2 ;;
                --group) group=$2 ;;
                --wheels) wheels=$2 ;;
                --constraint) constraint=$2 ;;
                --python) python=$2 ;;
            esac
            shift 2
            ;;
        --prometheus | --review) extras="$extras ${1#--}" && shift ;;
        --no-start) start=no && shift ;;
        -h | --help) usage && exit 0 ;;
        -*) wrong "unknown option $1" ;;
        *)
            [ -z "$wheel" ] || wrong "one wheel, not two: $wheel and $1"
            wheel=$1 && shift
            ;;
    esac
done
[ -n "$wheel" ] || wrong "no wheel given"
[ "$(id -u)" = 0 ] || die "only root can install a service" "sudo $0 ..."

# A path as the caller typed it, from the folder of the caller.
absolute() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s' "$caller/$1" ;;
    esac
}
here=$(cd -- "$(dirname -- "$(absolute "$0")")" && pwd)
prefix=/opt/rbc-edge
state=/var/lib/rbc-edge
config=/etc/rbc-edge/config.toml
unit=/etc/systemd/system/rbc-edge.service
dropin=$unit.d/10-folders.conf
review=/etc/systemd/system/rbc-edge-review.service
review_dropin=$review.d/20-folders.conf
command=/usr/local/bin/rbc-edge
user=rbc-edge

# -- checks. Nothing is changed up to the next heading ---------------------------------------------------

case $wheel in
    *rbc_edge-*.whl) ;;
    *) die "$wheel: not a wheel of rbc-edge" "the name must be rbc_edge-VERSION-py3-none-any.whl" 2 ;;
esac
wheel=$(absolute "$wheel")
[ -f "$wheel" ] || die "$wheel: there is no such file" "" 2
for file in systemd/rbc-edge.service systemd/rbc-edge-review.service systemd/config.toml requirements.txt requirements-prometheus.txt \
    requirements-review.txt; do
    [ -f "$here/$file" ] || die "$here/$file is missing" "copy the whole deploy folder of the release"
done
if [ -n "$wheels" ]; then
    wheels=$(absolute "$wheels")
    [ -d "$wheels" ] || die "$wheels: there is no such folder" "--wheels names a folder of wheels" 2
fi
if [ -n "$constraint" ]; then
    constraint=$(absolute "$constraint")
    [ -f "$constraint" ] || die "$constraint: there is no such file" "" 2
fi
for folder in "$source" "$out"; do
    case $folder in
        '' | /*) ;;
        *) die "$folder: not an absolute path" "give a path that begins with /" 2 ;;
    esac
done
if [ -n "$group" ] && ! getent group "$group" >/dev/null; then
    die "$group: there is no such group" "to see the group of the camera's folder: stat -c %G FOLDER" 2
fi
for program in useradd groupadd runuser flock getent; do
    command -v "$program" >/dev/null || die "$program is missing" "apt install passwd util-linux libc-bin"
done

if [ -z "$python" ]; then
    python=/usr/bin/python3
    [ -x "$python" ] || python=$(command -v python3) ||
        die "python3 is missing" "apt install python3 python3-venv"
fi
case $python in
    */*) python=$(absolute "$python") ;;
esac
command -v "$python" >/dev/null || die "$python: there is no such program" "" 2
# Not uname: Raspberry Pi OS can have a 64-bit kernel with 32-bit programs.
"$python" -I - <<'END' || exit 1
import platform, struct, sys
def no(what, advice):
    sys.exit(f"install.sh: {what}\n  {advice}")
version = "{}.{}".format(*sys.version_info)
if sys.version_info < (3, 11):
    no(f"{sys.executable} is Python {version}; rbc-edge needs 3.11 or newer",
       "Debian 12, Ubuntu 24.04 or newer have it; Ubuntu 22.04: apt install python3.11 python3.11-venv,"
       " then --python /usr/bin/python3.11")
if struct.calcsize("P") != 8:
    no("this is a 32-bit system; ONNX Runtime needs 64 bit", "install the 64-bit image of the operating system")
try:
    import ensurepip, venv  # Debian ships Python without them
except ImportError:
    no(f"{sys.executable} cannot make virtual environments",
       "apt install python3-venv" if sys.executable == "/usr/bin/python3" else f"apt install python{version}-venv")
import os
real = os.path.realpath(sys.executable)
if real.startswith(("/home/", "/root/")):
    no(f"{real} is in a home folder, which the service cannot read",
       "use the Python of the system: --python /usr/bin/python3")
END

systemd=no
[ ! -d /run/systemd/system ] || systemd=yes

exec 9>/run/rbc-edge-install.lock
flock -n 9 || die "another install.sh is running" "wait until it has finished"

# -- the new version, next to the old one ----------------------------------------------------------------

work=$(mktemp -d)
release=''          # the new version's folder
before=''           # the version in use until now
switched=no         # from here on the new version is in use
was_active=no
new_config=no
finished=no

give_up() {
    status=$?
    trap '' EXIT HUP INT TERM
    if [ "$finished" = no ]; then
        if [ "$switched" = yes ]; then
            [ "$systemd" = no ] || systemctl stop rbc-edge 2>/dev/null || true
            for file in "$unit" "$dropin" "$review" "$review_dropin"; do
                if [ -f "$work/$(basename "$file")" ]; then
                    cp -p "$work/$(basename "$file")" "$file"
                else
                    rm -f "$file"
                fi
            done
            if [ -n "$before" ]; then
                ln -s "$before" "$prefix/.current" && mv -T "$prefix/.current" "$prefix/current"
            else
                [ "$systemd" = no ] || systemctl disable --quiet rbc-edge 2>/dev/null || true
                rm -f "$prefix/current"
                [ "$(readlink "$command")" != "$prefix/current/bin/rbc-edge" ] || rm -f "$command"
            fi
            [ "$systemd" = no ] || systemctl daemon-reload
        fi
        [ "$new_config" = no ] || rm -f "$config"
        [ -z "$release" ] || rm -rf "$release"
        rmdir "$prefix/releases" "$prefix" 2>/dev/null || true
        [ "$was_active" = no ] || systemctl start --no-block rbc-edge || true
        if [ -n "$before" ]; then
            printf '%s\n' "install.sh: not upgraded. The previous version is still in use" >&2
        else
            printf '%s\n' "install.sh: not installed" >&2
        fi
    fi
    rm -rf "$work"
    exit "$status"
}
trap give_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if grep -Eqs '^[[:space:]]*prometheus[[:space:]]*=' "$config"; then extras="${extras% prometheus} prometheus"; fi
if [ -e "$review" ]; then extras="${extras% review} review"; fi
[ ! -L "$prefix/current" ] || before=$(readlink -f "$prefix/current")
name=$(basename "$wheel")
name=${name#rbc_edge-}
mkdir -p "$prefix/releases"
release=$(mktemp -d "$prefix/releases/${name%%-*}-XXXXXX")
chmod 755 "$release"

say "installing $(basename "$wheel") into $release"
"$python" -I -m venv "$release" || die "$python could not make a virtual environment" "see the messages above"
pip() { "$release/bin/python" -I -m pip --disable-pip-version-check --no-input --quiet "$@"; }
if [ -z "$wheels$constraint" ]; then
    # Exactly the tested versions, and no file whose hash is not in the list.
    set -- --requirement "$here/requirements.txt"
    for extra in $extras; do set -- "$@" --requirement "$here/requirements-$extra.txt"; done
    pip install --require-hashes --only-binary :all: "$@" ||
        die "pip could not install the libraries" \
            "without network: --wheels DIR. A Python that requirements.txt does not name: --constraint constraints.txt"
    pip install --no-index --no-deps "$wheel" || die "pip could not install $wheel" "see the messages above"
    pip check || die "the libraries in requirements.txt do not fit to $wheel" "take both from one release"
else
    set --
    if [ -n "$wheels" ]; then set -- "$@" --no-index --find-links "$wheels"; fi
    if [ -n "$constraint" ]; then set -- "$@" --constraint "$constraint"; fi
    # shellcheck disable=SC2086  # one word for each extra
    names=$(printf '%s,' $extras)
    pip install "$@" "$wheel${extras:+[${names%,}]}" ||
        die "pip could not install it" "without network, give a folder with all packages: --wheels DIR"
fi

# -- user, folders, settings -----------------------------------------------------------------------------

getent group "$user" >/dev/null || groupadd --system "$user"
getent passwd "$user" >/dev/null ||
    useradd --system --gid "$user" --home-dir "$state" --no-create-home --shell /usr/sbin/nologin \
        --comment "Blood smear counter" "$user"
[ -z "$group" ] || usermod --append --groups "$group" "$user"

# Runs a command as the user of the service, without the environment of root.
as_service() {
    (cd / && runuser -u "$user" -- env -i PATH=/usr/bin:/bin HOME="$state" "$@")
}

install -d -m 755 /etc/rbc-edge
install -m 644 "$here/systemd/config.toml" /etc/rbc-edge/config.toml.example
if [ ! -e "$config" ]; then
    new_config=yes
    "$release/bin/python" -I - "$here/systemd/config.toml" "$config" "$source" "$out" <<'END'
import json, sys
example, config, source, out = sys.argv[1:]
text = open(example, encoding="utf-8").read()
for key, was, value in (("source", "/srv/camera", source), ("out", "/var/lib/rbc-edge", out)):
    if value:  # a JSON string is a TOML string
        text = text.replace(f'\n{key} = "{was}"\n', f"\n{key} = {json.dumps(value, ensure_ascii=False)}\n")
with open(config, "x", encoding="utf-8") as file:
    file.write(text)
END
fi
as_service "$release/bin/rbc-edge" config validate --config "$config" >/dev/null ||
    die "$config is not valid for this version" "correct it, and run install.sh again" 2

# The sandbox must allow folders of the settings that are in unusual places.
as_service "$release/bin/rbc-edge" config show --json --config "$config" >"$work/settings.json" ||
    die "the settings cannot be read"
"$release/bin/python" -I - "$work/settings.json" "$work/new.conf" "$source" "$out" "$config" <<'END' || exit 2
import json, os, sys
shown, conf, given_source, given_out, config = sys.argv[1:]
settings = json.load(open(shown, encoding="utf-8"))
def value(key): return settings.get(key, {}).get("value")
def no(what, advice): sys.exit(f"install.sh: {what}\n  {advice}")
def under(path, *parents): return any(path == p or path.startswith(p + "/") for p in parents)
source, out, prometheus = value("source"), value("out"), value("prometheus")
for key, given, kept in (("source", given_source, source), ("out", given_out, out)):
    if given and os.path.normpath(given) != os.path.normpath(kept or "."):
        no(f"--{key} is {given}, but {config} says {kept}, and that file is kept",
           f"change {key} in that file, or leave --{key} out")
if not out:
    no(f"{config} has no folder for the results", 'add the line: out = "/var/lib/rbc-edge"')
read = [os.path.realpath(source)] if source else []
write = [os.path.realpath(out)]
if prometheus:
    write.append(os.path.realpath(os.path.dirname(prometheus)))
for path in read + write:
    if under(path, "/tmp", "/var/tmp", "/dev", "/proc", "/sys", "/run/user"):
        no(f"{path}: the service has a private folder there and cannot see this one", "choose another folder")
def quoted(path): return '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
unit, service = [], []
if any(under(path, "/home", "/root") for path in read + write):
    service += ["# A folder is under /home or /root. The service may only read there, as file permissions allow.",
                "ProtectHome=read-only"]
for path in dict.fromkeys(write):
    if not under(path, "/var/lib/rbc-edge"):
        unit.append(f"RequiresMountsFor={quoted(path)}")
        service.append(f"ReadWritePaths={quoted(path)}")
if unit:
    unit.insert(0, "# The service starts only when the disk of the results is mounted.")
lines = ["# Written by install.sh from the settings. Run it again after a change of source or out."]
if unit: lines += ["[Unit]", *unit]
if service: lines += ["[Service]", *service]
with open(conf, "w", encoding="utf-8") as file:
    if unit or service:
        file.write("\n".join(lines) + "\n")
with open(os.path.join(os.path.dirname(conf), "folders"), "w", encoding="utf-8") as file:
    file.write(f"{source or ''}\n{out}\n")
END
{ read -r source && read -r out; } <"$work/folders"

install -d -o "$user" -g "$user" -m 2750 "$state"
if [ ! -e "$out" ]; then
    [ -d "$(dirname "$out")" ] || die "$out: its parent folder is missing" "create it, or mount its disk"
    install -d -o "$user" -g "$user" -m 2750 "$out"
fi
as_service test -w "$out" -a -x "$out" ||
    die "$out: the user $user cannot write there" "chown $user:$user '$out'"

say "counting the test image"
as_service "$release/bin/rbc-edge" bundle verify ||
    die "the models do not run on this computer" "see the messages above"

# -- switch to the new version ---------------------------------------------------------------------------

for file in "$unit" "$dropin" "$review" "$review_dropin"; do
    [ ! -f "$file" ] || cp -p "$file" "$work/"
done
if [ "$systemd" = yes ] && systemctl is-active --quiet rbc-edge; then
    was_active=yes
    say "stopping the service"
    systemctl stop rbc-edge
fi
switched=yes
ln -s "$release" "$prefix/.current" && mv -T "$prefix/.current" "$prefix/current"
install -D -m 644 "$here/systemd/rbc-edge.service" "$unit"
if [ -s "$work/new.conf" ]; then
    install -D -m 644 "$work/new.conf" "$dropin"
else
    rm -f "$dropin"
    rmdir "$unit.d" 2>/dev/null || true
fi
case "$extras " in
    *" review "*)
        install -D -m 644 "$here/systemd/rbc-edge-review.service" "$review"
        if [ -e "$dropin" ]; then
            install -D -m 644 "$dropin" "$review_dropin"
        else
            rm -f "$review_dropin"
            rmdir "$review.d" 2>/dev/null || true
        fi
        ;;
esac
if [ ! -e "$command" ] && [ ! -L "$command" ] || [ "$(readlink "$command")" = "$prefix/current/bin/rbc-edge" ]; then
    install -d "$(dirname "$command")"
    ln -sfn "$prefix/current/bin/rbc-edge" "$command"
else
    say "$command belongs to another program. Call $prefix/current/bin/rbc-edge"
fi

if [ "$systemd" = no ]; then
    # An image of a system, or a container: the service starts when systemd starts.
    if [ "$start" = yes ] && command -v systemctl >/dev/null; then systemctl enable --quiet rbc-edge; fi
    say "systemd is not running, so nothing was started (with systemd: systemctl enable --now rbc-edge)"
else
    systemctl daemon-reload
    [ "$start" = no ] || [ ! -e "$review" ] || systemctl try-restart rbc-edge-review || true
    if [ "$start" = yes ] && [ -n "$source" ]; then
        systemctl enable --quiet rbc-edge
        say "starting the service. It checks the ledger first"
        if ! systemctl restart rbc-edge; then
            code=$(systemctl show --property ExecMainStatus --value rbc-edge)
            if [ "$code" = 5 ]; then
                say "not started yet: a folder is missing. systemd tries again until it is there"
            else
                journalctl --unit rbc-edge --lines 10 --no-pager --output cat >&2 || true
                die "the service did not start (exit code $code)" "see the messages above, and journalctl -u rbc-edge"
            fi
        fi
    fi
fi
finished=yes

# -- next steps for the user -----------------------------------------------------------------------------

# The previous version stays, so that you can go back to it by hand. Older ones are removed.
for old in "$prefix"/releases/*; do
    [ "$old" = "$release" ] || [ "$old" = "$before" ] || rm -rf "$old"
done
say "$(as_service "$release/bin/rbc-edge" --version) is installed. Settings: $config. Results: $out"
if [ -n "$source" ]; then
    if [ ! -d "$source" ]; then
        say "$source does not exist yet. The service waits for it"
    elif ! as_service test -r "$source" -a -x "$source"; then
        say "the user $user cannot read $source. Give --group $(stat -c %G "$source"), or run"
        say "  setfacl -R -m u:$user:rX -d -m u:$user:rX '$source' (and u:$user:x for the folders above it)"
    fi
fi
if [ -e "$review" ] && [ ! -e /etc/rbc-edge/review.password ]; then
    say "the review page is off. To use it, put a password of 12 characters or more into a file of root's,"
    say "  /etc/rbc-edge/review.password (chmod 600), then: systemctl enable --now rbc-edge-review"
fi
if [ "$systemd" = yes ] && ! grep -qsw memory /sys/fs/cgroup/cgroup.controllers; then
    say "the kernel does not limit memory, so MemoryMax has no effect. On a Raspberry Pi add"
    say "  cgroup_enable=memory to the line in /boot/firmware/cmdline.txt, and restart"
fi
say "to let another user read the results: adduser NAME $user"
