// Takes a photo with this device's camera: on phones by their own camera program, elsewhere in a dialog.

const $ = (id) => document.getElementById(id);

export function setUpCamera(onPhoto, onProblem) {
  const touch = matchMedia("(pointer: coarse)").matches;
  const live = Boolean(navigator.mediaDevices?.getUserMedia); // there only on https and on this machine's own address
  const button = $("camera");
  button.hidden = !touch && !live;
  button.addEventListener("click", () => (touch ? $("capture").click() : openDialog(onPhoto, onProblem)));
  $("camera-cancel").addEventListener("click", () => $("camera-dialog").close());
}

async function openDialog(onPhoto, onProblem) {
  const [dialog, view, shoot] = [$("camera-dialog"), $("camera-view"), $("shoot")];
  $("camera").disabled = true; // while the browser asks for leave: a second press would open the camera twice
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
  } catch (error) {
    onProblem(sentence(error));
    return;
  } finally {
    $("camera").disabled = false;
  }
  view.srcObject = stream;
  view.onloadeddata = () => (shoot.disabled = false);
  shoot.onclick = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [view.videoWidth, view.videoHeight];
    canvas.getContext("2d").drawImage(view, 0, 0);
    canvas.toBlob((blob) => onPhoto(blob), "image/jpeg", 0.92);
    dialog.close();
  };
  dialog.onclose = () => {
    stream.getTracks().forEach((track) => track.stop());
    view.srcObject = null;
    shoot.disabled = true;
  };
  dialog.showModal();
}

function sentence(error) {
  if (error.name === "NotAllowedError") {
    return "This page may not use the camera. Allow it in the browser's settings for this address, or choose a file.";
  }
  if (error.name === "NotFoundError") {
    return "This device has no camera that the browser can find. Choose a file instead.";
  }
  return "The camera cannot be used; another program may have it. Choose a file instead.";
}
