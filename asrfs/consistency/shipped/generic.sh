#!/bin/sh
# Stops a service for the time of an application-consistent point, and starts it again.
#
#   asrfs hooks add pre "generic myapp.service" --timeout 60s
#   asrfs hooks add post "generic myapp.service" --timeout 60s
#
# A service that can flush by itself is better served by a script of your own. What a hook is told: ASRFS_MACHINE,
# ASRFS_POINT (id), ASRFS_CONSISTENCY, ASRFS_PHASE (pre or post), and after the point ASRFS_FAILED (empty, or why).
set -eu
unit=${1:?the name of a systemd unit}
case $ASRFS_PHASE in
pre) exec systemctl stop "$unit" ;;
post) exec systemctl start "$unit" ;;
esac
