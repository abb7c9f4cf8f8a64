#!/bin/sh
# Removes the service and the program. Results and ledger always stay. Settings stay, except with --purge.
set -eu

# As in install.sh: root runs nothing that lies in the folder of the caller.
cd /

usage() {
    cat <<'END'
usage: uninstall.sh [--purge]

  --purge   also remove the settings in /etc/rbc-edge
END
}

purge=no
for argument in "$@"; do
    case $argument in
        --purge) purge=yes ;;
        -h | --help) usage && exit 0 ;;
        *) printf '%s\n' "uninstall.sh: unknown argument $argument" "  see uninstall.sh --help" >&2 && exit 2 ;;
    esac
done
if [ "$(id -u)" != 0 ]; then
    printf '%s\n' "uninstall.sh: only root can remove a service" "  sudo $0" >&2
    exit 1
fi

for name in rbc-edge-review rbc-edge; do
    unit=/etc/systemd/system/$name.service
    if [ -d /run/systemd/system ]; then
        if [ -e "$unit" ]; then systemctl disable --now --quiet "$name"; fi
    elif command -v systemctl >/dev/null && [ -e "$unit" ]; then
        systemctl disable --quiet "$name"
    fi
    # Changes made with `systemctl edit` are removed too: they are parts of the unit.
    rm -rf "$unit" "$unit.d"
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl reset-failed "$name" 2>/dev/null || true
    fi
done
[ "$(readlink /usr/local/bin/rbc-edge)" != /opt/rbc-edge/current/bin/rbc-edge ] || rm -f /usr/local/bin/rbc-edge
rm -rf /opt/rbc-edge /run/rbc-edge-install.lock
if [ "$purge" = yes ]; then rm -rf /etc/rbc-edge; fi

printf '%s\n' "rbc-edge: removed. These stay:"
[ ! -d /var/lib/rbc-edge ] || printf '%s\n' "  /var/lib/rbc-edge: results and ledger (results in other folders stay, too)"
[ ! -d /etc/rbc-edge ] || printf '%s\n' "  /etc/rbc-edge: settings (--purge removes them)"
if getent passwd rbc-edge >/dev/null; then
    printf '%s\n' "  the user and group rbc-edge, which own the results (to remove them: userdel rbc-edge)"
fi
