#!/usr/bin/env bash
# A private CA and one certificate per role in certs/, under the names that configs/*.toml use. What exists stays.
set -eu
cd "$(dirname "$0")/.."
certutil=.venv/bin/hypha-certutil
[ -e certs/root.pem ] || $certutil root --name "Hypha root" --out certs
[ -e certs/org.pem ] || $certutil org --name "Hypha organisation" --out certs
for role in gateway scheduler worker data; do
    [ -e "certs/$role.pem" ] || $certutil node --name "$role" --role "$role" --out certs
done
echo "certs/ holds a root, an organisation, and one certificate for each of gateway, scheduler, worker and data"
