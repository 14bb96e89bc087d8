// Browsers start no worker from a file that was opened without a server. There the search runs in a hidden frame instead;
// by the property `IFrameWorker` of this window its script knows that it does.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.document.open()
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.started = () => {
        this.waiting.forEach(data => this.send(data))
        this.waiting = null
      }
      inside.document.write(`<body><script src="${url}" onload="started()"></` + "script></body>")
      inside.document.close()
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.send(data)
    }

    send(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
