#!/usr/bin/env bash
# Downloads and unpacks COCO 2017: train and val images and annotations. Needs 42 GB during the
# download and 21 GB afterwards. Run it again to continue an interrupted download; after a complete
# one it does nothing.
#   scripts/download_coco.sh /data/coco
#   scripts/download_coco.sh --only val,annotations /data/coco     # 2 GB, enough for evaluation
#   SEGTRAIN_COCO_URL=https://mirror.example/coco scripts/download_coco.sh
# Exit codes: 0 done, 2 usage, 3 a wrong checksum, 5 disk or network, 143 SIGTERM.
set -euo pipefail

# The bucket behind images.cocodataset.org, under the host name of its certificate. Its own host
# name supports http only (https://github.com/traceopt-ai/traceml/pull/469).
base=${SEGTRAIN_COCO_URL:-https://s3.amazonaws.com/images.cocodataset.org}
base=${base%/}

usage='usage: scripts/download_coco.sh [--only train,val,annotations] [folder=coco]'
fail() { # code, message
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

only=train,val,annotations
folder=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage" && exit 0 ;;
    --only=*) only=${1#--only=} ;;
    --only) only=${2-} && shift "$(($# > 1))" ;;
    -*) fail 2 "no such option: $1; $usage" ;;
    *) if [ -n "$folder" ]; then fail 2 "give only one folder; $usage"; else folder=$1; fi ;;
  esac
  shift
done
folder=${folder:-coco}
if [ "$folder" != / ]; then folder=${folder%/}; fi
[[ ,$only, =~ ^,((train|val|annotations),)+$ ]] || fail 2 "invalid --only '$only'; $usage"
for tool in curl unzip md5sum flock; do
  command -v $tool >/dev/null || fail 2 "$tool is not installed; install it"
done

# COCO publishes no checksums; these are in ppdet/utils/download.py of PaddlePaddle/PaddleDetection,
# among others. $SEGTRAIN_COCO_MD5 names a file with other checksums, for a mirror whose archives
# differ.
checksums='f4bbac642086de4f52a3fdda2de5fa2c  annotations_trainval2017.zip
442b8da7639aecaf257c1dceb8ba8c80  val2017.zip
cced6f7f71b7629ddf16f17bbcfab6b2  train2017.zip'
if [ -n "${SEGTRAIN_COCO_MD5:-}" ]; then
  echo "checksums: $SEGTRAIN_COCO_MD5"
  checksums=$(cat "$SEGTRAIN_COCO_MD5") || fail 2 "cannot read \$SEGTRAIN_COCO_MD5"
fi

# A signal may reach this shell only, so slow commands run in the background and are ended with it.
# shellcheck disable=SC2329 # called by the traps
end_by_signal() { # exit code
  local child
  child=$(jobs -pr)
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  exit "$1"
}
trap 'end_by_signal 129' HUP
trap 'end_by_signal 130' INT
trap 'end_by_signal 143' TERM
interruptible() {
  "$@" &
  wait $!
}

size_of() { if [ -e "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# Holds partial downloads, and the checksum of each finished archive.
work=$folder/.download
mkdir -p "$work" || fail 5 "cannot create $work; check the permissions"
exec 9>"$work/lock" || fail 5 "cannot write to $work; check the permissions"
flock -n 9 || fail 2 "another download into $folder is running; wait for it or stop it"

# Sets the variables of an archive.
set_archive() { # train, val or annotations
  case $1 in
    annotations) zip=annotations_trainval2017.zip path=annotations subfolder=annotations times=5 ;;
    *) zip=${1}2017.zip path=zips subfolder=${1}2017 times=2 ;; # JPEGs do not grow when unpacked
  esac
  url=$base/$path/$zip
  part=$work/$zip.part
  unpacked=$work/$zip.unpacked
  marker=$work/$zip.md5
  md5=$(awk -v zip="$zip" '$2 == zip || $2 == "*" zip { print $1; exit }' <<<"$checksums")
  [[ $md5 =~ ^[0-9a-f]{32}$ ]] || fail 2 "no checksum of $zip in $SEGTRAIN_COCO_MD5; add it"
}

is_done() { [ -d "$folder/$subfolder" ] && [ "$(cat "$marker" 2>/dev/null)" = "$md5" ]; }

# Sets `length` to the size of the archive on the server.
fetch_length() {
  local head=$work/$zip.head
  interruptible curl --fail --silent --show-error --location --head --connect-timeout 30 --retry 3 \
    --output "$head" "$url" || fail 5 "cannot reach $url; check the network"
  # Redirections have a length too; the last one is that of the file.
  length=$(tr -d '\r' <"$head" | awk 'tolower($1) == "content-length:" { n = $2 } END { print n }')
  rm -f "$head"
  [[ $length =~ ^[0-9]+$ ]] || fail 5 "the server does not report the size of $url; use another mirror"
}

# Continues a partial file until it is complete.
download() {
  local before meter status tries=0
  meter=--no-progress-meter
  if [ -t 2 ]; then meter=--progress-bar; fi
  if [ "$(size_of "$part")" -gt "$length" ]; then rm "$part"; fi # from another archive
  while before=$(size_of "$part") && [ "$before" -lt "$length" ]; do
    echo "$zip: downloading from byte $before of $length"
    status=0
    # Without --retry: curl would restart each attempt at the initial offset.
    interruptible curl --fail --location $meter --connect-timeout 30 --speed-limit 1000 \
      --speed-time 60 --continue-at - --output "$part" "$url" || status=$?
    case $status in
      0) ;;
      23) fail 5 "cannot write $part; free some space" ;;
      33 | 36) rm -f "$part" ;; # the server does not support resuming
    esac
    if [ "$(size_of "$part")" -gt "$before" ]; then
      tries=0
    elif [ $((tries += 1)) -ge 5 ]; then
      fail 5 "the download of $url stalled (curl exit code $status); run this again to continue"
    else
      interruptible sleep $((2 ** tries))
    fi
  done
}

verify() {
  echo "$zip: verifying the checksum"
  interruptible md5sum "$part" >"$work/$zip.sum" || fail 5 "cannot read $part"
  local actual
  read -r actual _ <"$work/$zip.sum"
  rm "$work/$zip.sum"
  if [ "$actual" != "$md5" ]; then
    rm "$part"
    fail 3 "$url has checksum $actual, not $md5; its file was deleted, run this again to download it"
  fi
}

# Unpacks into a temporary folder, so that the final folder has complete files only. unzip verifies
# the checksum of each file.
unpack() {
  echo "$zip: unpacking"
  rm -rf "$unpacked"
  mkdir "$unpacked"
  interruptible unzip -q -o "$part" -d "$unpacked" || fail 5 "cannot unpack $part; free some space"
  [ -d "$unpacked/$subfolder" ] || fail 3 "$url does not contain $subfolder; use another mirror"
}

# Moves the files to their folder and keeps files that exist there.
install_files() {
  local target=$folder/$subfolder left differing=()
  if ! [ -e "$target" ]; then
    mv "$unpacked/$subfolder" "$target" || fail 5 "cannot write $target; check the permissions"
  else
    # Some versions of mv fail if a file exists; the comparison below detects real differences.
    find "$unpacked/$subfolder" -type f -exec mv -n -t "$target" {} + || true
    while IFS= read -rd '' left; do
      cmp -s "$left" "$target/${left##*/}" || differing+=("$target/${left##*/}")
    done < <(find "$unpacked/$subfolder" -type f -print0)
    if [ ${#differing[@]} -gt 0 ]; then
      fail 2 "${#differing[@]} files in $target differ from COCO's, e.g. ${differing[0]}; move them away and run this again"
    fi
  fi
  rm -rf "$unpacked"
  echo "$md5" >"$marker"
  rm "$part"
}

# Small archives first, so that problems show early.
todo=()
needed=0
declare -A lengths
for archive in annotations val train; do
  [[ ,$only, == *,$archive,* ]] || continue
  set_archive $archive
  if is_done; then
    echo "$folder/$subfolder: already complete"
    rm -f "$part" # left by an interruption between the last two steps
  else
    fetch_length
    lengths[$archive]=$length
    todo+=("$archive")
    needed=$((needed + length * times - $(size_of "$part")))
  fi
done
free=$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') * 1024))
if [ "$needed" -gt "$free" ]; then
  fail 5 "$folder has $((free / 10 ** 9)) GB free and needs $((needed / 10 ** 9 + 1)) GB; free some space"
fi
for archive in "${todo[@]}"; do
  set_archive "$archive"
  length=${lengths[$archive]}
  download
  verify
  unpack
  install_files
  echo "$folder/$subfolder: done"
done
echo "next: segtrain doctor $folder"
