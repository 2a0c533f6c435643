#!/bin/sh
# Before an application-consistent point: CHECKPOINT, so that the server on the recovered disk has little to replay.
#
#   asrfs hooks add pre postgresql                                   the local server, as the system user postgres
#   asrfs hooks add pre "postgresql -h /run/other -p 5433 -U backup"  arguments go to psql, which then runs as root
#
# All of the cluster's files, tablespaces and pg_wal included, must lie on disks of this machine. Then a point is one
# instant of all of them, PostgreSQL recovers from it as from a power cut, and no transaction it acknowledged is missing:
# it needs no backup mode.
set -eu
if [ $# -gt 0 ]; then
    exec psql -XqAt -v ON_ERROR_STOP=1 "$@" -d postgres -c CHECKPOINT
fi
user=postgres
home=$(getent passwd "$user" | cut -d: -f6)
exec setpriv --reuid="$user" --regid="$user" --init-groups -- \
    env HOME="$home" psql -XqAt -v ON_ERROR_STOP=1 -d postgres -c CHECKPOINT
