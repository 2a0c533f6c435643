#!/bin/sh
# Around an application-consistent point of MySQL or MariaDB: FLUSH TABLES WITH READ LOCK, held until the point is made.
#
#   asrfs hooks add hold mysql --timeout 60s
#   asrfs hooks add hold "mysql --defaults-extra-file=/etc/mysql/asrfs.cnf"    arguments go to the client
#
# The lock lives as long as the client's connection: it ends with our standard input, with this script, and with the
# server, so nobody is left behind a lock. If the connection was lost meanwhile, unlocking fails, and the point is no
# application point. InnoDB alone would not need one: it
# recovers as from a power cut. MyISAM and Aria do.
set -eu
client=$(command -v mariadb || command -v mysql) || {
    echo "there is no client program mariadb or mysql"
    exit 1
}
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
mkfifo "$directory/statements"
exec 3<&0
{
    echo "FLUSH TABLES WITH READ LOCK;"
    echo "SELECT 'holding';"
    cat <&3 >/dev/null
    echo "UNLOCK TABLES;"
} >"$directory/statements" &
feeder=$!
code=0
"$client" "$@" --batch --skip-column-names --unbuffered --skip-reconnect <"$directory/statements" 3<&- || code=$?
kill "$feeder" 2>/dev/null || true
exit "$code"
