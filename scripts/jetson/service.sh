#!/usr/bin/env bash
# usage: service.sh FOLDER MODEL [OPTION ...]: serve MODEL now and after every boot; options are those of acmix-deploy serve.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
folder=$(realpath "$1") model=$(realpath "$2")
shift 2

for path in "$folder/venv/bin/acmix-deploy" "$model"; do
    [ -f "$path" ] || { echo "error: $path is no file; run install.sh and build.sh first" >&2; exit 2; }
done
# Other characters mean something to systemd.
for word in "$folder" "$model" "$@"; do
    [[ $word =~ ^[A-Za-z0-9/._:,=-]+$ ]] || {
        echo "error: $word: folder, model and options may hold letters, digits and / . _ : , = - alone" >&2
        exit 2
    }
done

echo "ARGUMENTS=\"$model $*\"" | sudo tee /etc/default/acmix-deploy
sed "s|/opt/acmix-deploy|$folder|" "$(dirname "$0")/acmix-deploy.service" |
    sudo tee /etc/systemd/system/acmix-deploy.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl enable acmix-deploy
sudo systemctl restart acmix-deploy
echo "Started. What it says: journalctl -u acmix-deploy -f"
