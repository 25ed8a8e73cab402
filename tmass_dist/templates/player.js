"use strict";
// Plays a video inside an element, or shows its frames in turn where there is no file or the browser cannot play it.
// Used by the search page and by the report of an evaluation.

const seconds = (value) => {
  const whole = Math.floor(value);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}.${Math.floor((value - whole) * 10)}`;
};

// A video is {url (or null), count (of frames), time(frame) in seconds, label(frame), picture(frame): an element}.
function playIn(media, video, frame) {
  const shown = media.querySelector("video");
  if (shown) { // it plays already: seek
    shown.currentTime = video.time(frame);
    return;
  }
  media.classList.add("playing");
  if (!video.url) return showFrames(media, video, frame, "Frames only");
  const player = document.createElement("video");
  Object.assign(player, { controls: true, muted: true, playsInline: true, preload: "auto" });
  const fallBack = () => showFrames(media, video, frame, "This browser cannot play the file: its frames");
  player.addEventListener("loadedmetadata", () => {
    player.currentTime = Math.min(video.time(frame), Math.max(0, player.duration - 0.05));
    player.play().catch(() => {}); // a browser may forbid it; the controls are there
    if (!player.videoWidth) fallBack(); // sound only
  });
  player.addEventListener("error", fallBack);
  player.src = video.url;
  media.replaceChildren(player);
}

function showFrames(media, video, frame, why) {
  clearInterval(media.timer);
  if (!video.count) return;
  const note = document.createElement("span");
  note.className = "note";
  let now = frame;
  const draw = () => {
    note.textContent = `${why}, ${video.label(now)}`;
    media.replaceChildren(video.picture(now), note);
    now = (now + 1) % video.count;
  };
  draw();
  media.classList.add("slides");
  media.timer = setInterval(() => { if (media.isConnected) draw(); else clearInterval(media.timer); }, 700);
}
